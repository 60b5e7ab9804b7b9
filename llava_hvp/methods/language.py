"""What a method inside the language model is: after which layers it drops, and which tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llava_hvp.errors import OptionError
from llava_hvp.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A place between two decoder layers where visual tokens are dropped.

    Parameters
    ----------
    layer : int
        decoder layers that run before the drop, at least 1: layer `layer`, numbered from 0, is the
        first that sees fewer tokens
    reads : str
        the rows of attention that score: "last" of the prompt, or its "raters"
    of : str
        whose queries and keys: of the layer "before" the drop, which has run, or of the "next", on
        the states that it is about to get
    """

    layer: int
    reads: Literal["last", "raters"] = "last"
    of: Literal["before", "next"] = "before"


@dataclass(frozen=True)
class LanguageContext:
    """B rows of n tokens at one stage, prompts padded on the left.

    Parameters
    ----------
    attention : Tensor
        (B, heads, R, n) float32, of R query rows over all keys, after the softmax
    raters : Tensor
        (B, R) bool, which of the R query rows count: a batch of prompts may have unlike many
    visual : Tensor
        (B, n) bool, the tokens of images, newlines and merged ones included
    valid : Tensor
        (B, n) bool, all but padding
    rope : Tensor | None
        (B, 1, R, n) float32, what the rotary embedding alone gives: the product of two vectors of
        ones at these places, scaled as for attention; for methods with `reads_rope`
    stage : int
        index among the method's stages
    """

    attention: Tensor
    raters: Tensor
    visual: Tensor
    valid: Tensor
    rope: Tensor | None
    stage: int


@dataclass(frozen=True, kw_only=True)
class LanguageMethod(Method, ABC):
    """A method inside the language model: it drops visual tokens between decoder layers.

    All visual tokens of a row are one set, whatever image they are of; text is never dropped.

    Parameters
    ----------
    r_max : float | None
        upper bound on the visual tokens that enter a layer, averaged over all layers, divided by
        those that the language model gets, in (0, 1]; 1 keeps all
    num_tokens : int | None
        instead of `r_max`, that average as a number for one image
    """

    where: ClassVar[str] = "language model"
    roles: ClassVar[tuple[str, ...]] = ("kept",)

    @property
    def positions(self) -> Literal["kept", "renumbered"]:
        """Whether tokens behind a drop keep their positions, or close up."""
        return "kept"

    @property
    def reads_rope(self) -> bool:
        """Whether its scores go by `LanguageContext.rope`."""
        return False

    @abstractmethod
    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Where it drops in a language model of `depth` layers, strictly rising, below `depth`.

        Raises LayerError where its layers do not fit.
        """

    @abstractmethod
    def keeps(self, visual: int, depth: int, images: int = 1) -> tuple[int, ...]:
        """Visual tokens of a row that are chosen to stay at each stage, at most those there are.

        Raises OptionError for a budget below what the layers before the first stage see.

        Parameters
        ----------
        visual : int
            visual tokens of the row, at least 1
        images : int
            images that they are of, which `num_tokens` is multiplied by
        """

    def merges(self, dropped: int) -> int:
        """Tokens that are made of so many dropped ones; they go on beside those that stay."""
        return 0

    def merge(self, states: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(M, D) what is made of dropped tokens, and (M,) the columns that it is made at.

        Parameters
        ----------
        states : Tensor
            (g, D), hidden states of the dropped tokens, the best scored first
        columns : Tensor
            (g,) int64, where they stand in their row
        """
        raise NotImplementedError(f"{type(self).__name__} merges nothing")

    def raters(self, embeds: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """(B, n) bool, the tokens of the text behind the images that score; all by default.

        Parameters
        ----------
        embeds : Tensor
            (B, n, D), the prompt's input embeddings
        visual, text : Tensor
            (B, n) bool, tokens of images and of the text behind them
        """
        return text

    def scores(self, context: LanguageContext) -> Tensor:
        """(B, n) float32, what each token is worth; the mean over heads and raters by default."""
        count = context.raters.sum(1).clamp(min=1)
        rows = context.attention.mean(1) * context.raters[..., None]
        total: Tensor = rows.sum(1) / count[:, None]
        return total

    def check(self, depth: int) -> None:
        """Raise OptionError where layers or an `r_max` cannot be met in so many layers."""
        self.stages(depth)
        if self.r_max is not None:
            self.keeps(MANY, depth)

    def counts(self, visual: int, depth: int, images: int = 1) -> tuple[int, ...]:
        """Visual tokens of a row that go on after each stage, merged ones included."""
        return self._going_on(visual, self.keeps(visual, depth, images))

    def _going_on(self, visual: int, keeps: tuple[int, ...]) -> tuple[int, ...]:
        found, now = list[int](), visual
        for kept in keeps:
            kept = min(kept, now)
            now = kept + self.merges(now - kept)
            found.append(now)
        return tuple(found)

    def average(self, visual: int, depth: int, images: int = 1) -> float:
        """Visual tokens that enter a layer, averaged over all layers."""
        return self._averaged(visual, self.keeps(visual, depth, images), depth)

    def _averaged(self, visual: int, keeps: tuple[int, ...], depth: int) -> float:
        starts = [0, *(stage.layer for stage in self.stages(depth)), depth]
        entering = [visual, *self._going_on(visual, keeps)]
        spans = zip(starts, starts[1:], entering, strict=False)
        return sum((end - start) * count for start, end, count in spans) / depth

    def largest(
        self, kept: Callable[[float], tuple[int, ...]], bound: float, visual: int, depth: int
    ) -> tuple[int, ...]:
        """The most that is kept by a rate in (0, 1] within a bound on the average.

        Raises OptionError for `num_tokens` that the smallest rate exceeds.

        Parameters
        ----------
        kept : Callable[[float], tuple[int, ...]]
            what a rate keeps at each stage; rises with it
        """
        low, high = 0.0, 1.0
        if self._averaged(visual, kept(high), depth) <= bound + 1e-9:
            return kept(high)
        for _ in range(50):
            middle = (low + high) / 2
            fits = self._averaged(visual, kept(middle), depth) <= bound + 1e-9
            low, high = (middle, high) if fits else (low, middle)
        least = self._averaged(visual, kept(0.0), depth)
        # Of a row with few tokens one stays at each drop, whatever its share.
        excess = 0 if self.num_tokens is not None else len(kept(0.0))
        if least > bound + excess + 1e-9:
            given = (
                f"r_max={self.r_max}"
                if self.num_tokens is None
                else f"num_tokens={self.num_tokens}"
            )
            raise OptionError(
                f"{self.name}: {given} of {visual} visual tokens cannot be met: one token at each "
                f"drop, and what is merged, is {least:.1f} averaged over {depth} layers: {_REMEDY}"
            )
        return kept(low)

    def bound(self, visual: int, depth: int, images: int = 1) -> float:
        """What the budget lets enter a layer of a row's visual tokens, averaged over all layers.

        Raises OptionError where the layers before the first stage see more already.
        """
        first = self.stages(depth)[0].layer
        if self.num_tokens is None:
            r_max = self.r_max or 0.0
            if r_max * depth <= first:
                raise OptionError(
                    f"{self.name}: r_max={r_max} cannot be met: the {_layers(first)} before the "
                    f"drop see all tokens, which alone is {first / depth:.3f} of them averaged "
                    f"over {depth} layers: {_REMEDY}"
                )
            return r_max * visual
        most = float(self.num_tokens * images)
        if most * depth <= first * visual:
            least = first * visual // (depth * images) + 1
            raise OptionError(
                f"{self.name}: num_tokens={self.num_tokens} of {visual} visual tokens of "
                f"{images} image{'s' * (images != 1)} cannot be met: the {_layers(first)} "
                f"before the drop see all tokens, which alone is "
                f"{first * visual / depth / images:.1f} an image averaged over {depth} layers: "
                f"give {least} or more, or prune the vision tower as well"
            )
        return min(most, float(visual))


MANY = 10_000  # visual tokens, so that rounding them decides nothing
_REMEDY = "give more, or drop earlier, or prune the vision tower as well"


def _layers(count: int) -> str:
    return "layer" if count == 1 else f"{count} layers"
