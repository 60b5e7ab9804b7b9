"""PyramidDrop: drops at several depths of the language model, by the last token's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods.checks import decoder_layers, layer_numbers, scaled_decoder_layers
from llava_hvp.methods.language import LanguageMethod, Stage

PAPER, EARLY = (8, 16, 24), (2, 8, 16)


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LanguageMethod):
    """PyramidDrop (arXiv 2410.17247).

    Before some decoder layers the visual tokens that are left are ranked by the attention that the
    prompt's last token would pay them there, mean over heads, and the best stay. What is behind a
    drop moves up: positions have no gaps.

    Without a budget it is the paper's: halves after 8, 16 and 24 of 32 layers, 47 % on average. A
    budget is met after 2, 8 and 16 layers, which the authors give for smaller ones (issue 29), by
    the largest lambda whose powers, rounded down, stay within it: of 576 tokens 192 on average keep
    322, 180 and 101, and 64 keep 110, 21 and 4.

    Official code: github.com/Cooperx521/PyramidDrop@6444f30 (Apache-2.0). Departures: grouped
    keys (Mistral), batches and several images work; the softmax is float32, ties go to the lower
    index, and one token stays at least.

    Parameters
    ----------
    layers : tuple[int, ...] | None
        layers that run before each drop
    ratios : tuple[float, ...] | None
        instead of a budget, the part of all tokens that stays after each drop; halves of the one
        before where only `layers` are given
    """

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "in the language model, at three depths, by the last token's attention"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", layer_numbers(self, "layers"))
        if self.ratios is None:
            return
        given = (self.r_max, self.num_tokens) != (None, None)
        if given:
            raise OptionError(
                f"pyramiddrop: ratios={shown(self.ratios)} excludes r_max and num_tokens: give one"
            )
        numbers = isinstance(self.ratios, (tuple, list)) and all(
            type(r) in (int, float) and 0 < r <= 1 for r in self.ratios
        )
        if not numbers or not self.ratios or sorted(self.ratios, reverse=True) != [*self.ratios]:
            raise OptionError(
                f"pyramiddrop: ratios={shown(self.ratios)}: give falling numbers in (0, 1]"
            )
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if len(self.ratios) != len(self.layers or PAPER):
            raise OptionError(
                f"pyramiddrop: ratios={shown(self.ratios)} for {len(self.layers or PAPER)} drops: "
                "give one for each of layers"
            )

    def _has_budget(self) -> bool:
        return True  # the paper's, where none is given

    @property
    def positions(self) -> Literal["kept", "renumbered"]:
        return "renumbered"

    @property
    def _budgeted(self) -> bool:
        return self.r_max is not None or self.num_tokens is not None

    def stages(self, depth: int) -> tuple[Stage, ...]:
        if self.layers is None:
            layers = scaled_decoder_layers(EARLY if self._budgeted else PAPER, depth)
        else:
            layers = decoder_layers(self.layers, depth, "pyramiddrop: layers")
        return tuple(Stage(layer, of="next") for layer in layers)

    def keeps(self, visual: int, depth: int, images: int = 1) -> tuple[int, ...]:
        count = len(self.stages(depth))
        if not self._budgeted:
            ratios = self.ratios or tuple(0.5**power for power in range(1, count + 1))
            return _kept(visual, ratios)
        bound = self.bound(visual, depth, images)

        def powers(rate: float) -> tuple[int, ...]:
            return _kept(visual, tuple(rate**power for power in range(1, count + 1)))

        return self.largest(powers, bound, visual, depth)


def _kept(visual: int, ratios: tuple[float, ...]) -> tuple[int, ...]:
    """Rounded down; what is a whole number but for its last bits stays one."""
    return tuple(max(1, int(visual * ratio + 1e-9)) for ratio in ratios)
