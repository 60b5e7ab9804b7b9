"""FastV: one drop early in the language model, by the last token's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.errors import OptionError
from llava_hvp.methods.checks import decoder_layers, integer, number, scaled_decoder_layers
from llava_hvp.methods.language import LanguageMethod, Stage
from llava_hvp.methods.worth import OneLayer, WorthTrying


@dataclass(frozen=True, kw_only=True)
class FastV(LanguageMethod):
    """FastV (arXiv 2403.06764).

    After `layer` decoder layers the visual tokens are ranked by the attention that the prompt's
    last token paid them in the layer before, mean over its heads; the best stay, for the prompt and
    for all that is generated. Tokens keep their positions.

    Official code: github.com/pkunlp-icler/FastV@d165972 (no licence given), whose settings are
    `layer` 2 or 3 and half of the tokens. The paper speaks of the attention from all tokens; every
    version of the code takes the last one's, as here. Departures: heads are averaged in float32,
    ties go to the lower index, each row of a batch and all images of a row are ranked, and the
    choice is made once, as in the code's versions with a cache.

    Parameters
    ----------
    layer : int | None
        layers that see all tokens (paper: K); 2 of 32 by default
    ratio : float | None
        instead of a budget, the part of the tokens that stays after the drop (paper: 1 - R)
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "in the language model, after layer 2, by the last token's attention"
    worth_trying: ClassVar[WorthTrying] = {"layer": OneLayer()}

    layer: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None:
            number(self, "ratio", above=0, most=1)
            if self.r_max is not None or self.num_tokens is not None:
                raise OptionError(
                    f"fastv: ratio={self.ratio!r} excludes r_max and num_tokens: give one"
                )
        super().__post_init__()
        if self.layer is not None:
            integer(self, "layer", least=1)

    def _has_budget(self) -> bool:
        return self.ratio is not None or super()._has_budget()

    @property
    def keeps_all(self) -> bool:
        """Whether the budget alone says that every token stays."""
        return super().keeps_all or self.ratio == 1

    def stages(self, depth: int) -> tuple[Stage, ...]:
        if self.layer is None:
            return (Stage(scaled_decoder_layers((2,), depth)[0]),)
        return (Stage(decoder_layers((self.layer,), depth, "fastv: layer")[0]),)

    def keeps(self, visual: int, depth: int, images: int = 1) -> tuple[int, ...]:
        if self.ratio is not None:
            return (max(1, round(self.ratio * visual)),)
        first = self.stages(depth)[0].layer
        rest = self.bound(visual, depth, images) * depth - first * visual
        return (min(visual, max(1, int(rest / (depth - first) + 1e-9))),)
