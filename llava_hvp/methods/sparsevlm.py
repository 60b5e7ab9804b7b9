"""SparseVLM: drops at three depths by the text that rates, and merges part of what goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llava_hvp.errors import OptionError, shown
from llava_hvp.lazy import torch
from llava_hvp.methods.checks import (
    choice,
    decoder_layers,
    layer_numbers,
    scaled_decoder_layers,
)
from llava_hvp.methods.language import LanguageContext, LanguageMethod, Stage
from llava_hvp.methods.masks import top_k
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = (3, 7, 16)
HEADS = 14  # that 2.0 asks
# Tokens chosen at each drop where the code's tables say 192: the shape that a budget scales.
CHOSEN = {"1.5": (300, 200, 110), "2.0": (300, 200, 118)}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(LanguageMethod):
    """SparseVLM (arXiv 2410.04417; 2.0 is SparseVLM+).

    Tokens of the text behind the images that are more relevant to them than the average, by input
    embeddings, rate the visual tokens: by their attention in the layer before each drop, mean over
    heads and raters. Version 1.5 merges the better part of what goes into a few tokens by clusters
    (density peaks), behind those that stay, and closes positions up. Version 2.0 divides the
    attention by what RoPE alone gives, asks the 14 heads that look most at the image, merges
    nothing and leaves positions as they are.

    A budget bounds what enters a layer on average, merged tokens included, as of every method
    here; it scales the code's list of 192. The code's own lists go by `tokens`: 300,200,110,
    303,110,36, 238,48,26 and 66,30,17 are "192", "128", "96" and "64" of 576 tokens in its tables
    (2.0: 300,200,118, 238,108,60, 246,54,28 and 66,34,20). Those count a drop's layer with what
    leaves it: what enters is 206.5, 145.4, 114.1 and 82.3 on average (2.0: 206.8, 144.1, 113.9 and
    81.8).

    Official code: github.com/Gumpest/SparseVLMs@26a5f48 (Apache-2.0). The paper's count by the
    rank of the attention is the code's no more. Departures: of two equal densities the lower index
    is the denser, where the code adds noise; float32 scores, ties to the lower index; rows of a
    batch are pruned each by itself; raters stand behind the last image; a list that is longer than
    the tokens keeps all.

    Parameters
    ----------
    version : str
        "1.5", or "2.0"
    layers : tuple[int, ...] | None
        layers that run before each drop; 3, 7 and 16 of 32 by default
    tokens : tuple[int, ...] | None
        instead of a budget, how many are chosen at each drop, beside what is merged
    """

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = (
        "in the language model, at three depths, by the text that rates; merges"
    )
    worth_trying: ClassVar[WorthTrying] = {"version": Values(("1.5", "2.0"))}

    version: str = "1.5"
    layers: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            if (self.r_max, self.num_tokens) != (None, None):
                raise OptionError(
                    f"sparsevlm: tokens={shown(self.tokens)} excludes r_max and num_tokens: give "
                    "one"
                )
            object.__setattr__(self, "tokens", layer_numbers(self, "tokens"))
        super().__post_init__()
        choice(self, "version", CHOSEN)
        if self.layers is not None:
            object.__setattr__(self, "layers", layer_numbers(self, "layers"))
        drops = len(self.layers or LAYERS)
        if len(self.tokens or LAYERS) != drops or (self.tokens is None and drops != len(LAYERS)):
            raise OptionError(
                f"sparsevlm: layers={shown(self.layers)}, tokens={shown(self.tokens)}: give tokens "
                f"for each of layers; a budget is for {len(LAYERS)}"
            )

    def _has_budget(self) -> bool:
        return self.tokens is not None or super()._has_budget()

    @property
    def positions(self) -> Literal["kept", "renumbered"]:
        return "renumbered" if self.version == "1.5" else "kept"

    @property
    def reads_rope(self) -> bool:
        return self.version == "2.0"

    def stages(self, depth: int) -> tuple[Stage, ...]:
        if self.layers is None:
            layers = scaled_decoder_layers(LAYERS, depth)
        else:
            layers = decoder_layers(self.layers, depth, "sparsevlm: layers")
        return tuple(Stage(layer, reads="raters") for layer in layers)

    def keeps(self, visual: int, depth: int, images: int = 1) -> tuple[int, ...]:
        if self.tokens is not None:
            return self.tokens
        shape = CHOSEN[self.version]
        bound = self.bound(visual, depth, images)

        def scaled(rate: float) -> tuple[int, ...]:
            return tuple(
                max(1, min(visual, int(rate * visual * part / shape[-1]))) for part in shape
            )

        return self.largest(scaled, bound, visual, depth)

    def merges(self, dropped: int) -> int:
        if self.version == "2.0" or not dropped:
            return 0
        return _candidates(dropped) // 10 + 1

    def merge(self, states: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        x = states[: _candidates(len(states))]
        merged, centres = merged_by_density(x.float(), self.merges(len(states)))
        return merged.to(states.dtype), columns[centres]

    def raters(self, embeds: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """Tokens of the text whose share of the image's similarity is above the mean."""
        relevance = embeds.float() @ embeds.float().transpose(1, 2)
        shares = relevance.masked_fill(~text[:, None], float("-inf")).softmax(-1)
        share = (shares * visual[..., None]).sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
        mean = (share * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
        found = text & (share > mean)
        # All alike, as a single one: none is above their mean.
        return torch.where(found.any(1, keepdim=True), found, text)

    def scores(self, context: LanguageContext) -> Tensor:
        if context.rope is None:
            return super().scores(context)
        corrected = context.attention / context.rope
        counted = context.raters[:, None, :, None] & context.visual[:, None, None]
        by_head = corrected.masked_fill(~counted, 0).sum(2)  # (B, heads, n)
        heads = top_k(by_head.sum(-1), HEADS)
        chosen = (by_head * heads[..., None]).sum(1) / heads.sum(1, keepdim=True)
        scores: Tensor = chosen / context.raters.sum(1, keepdim=True).clamp(min=1)
        return scores


def _candidates(dropped: int) -> int:
    """Of so many dropped tokens those that are merged, the best scored."""
    return int(dropped * 0.3) + 1


def merged_by_density(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count, D) means of clusters around density peaks, and (count,) the token each is around.

    Parameters
    ----------
    x : Tensor
        (g, D) float32, at least `count` tokens
    """
    # Not by products: two tokens must be as far from each other in both directions.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    nearest = distance.sort(dim=1).values[:, :count]
    density = (-nearest.square().mean(1)).exp()
    place = torch.arange(len(x), device=x.device)
    denser = (density > density[:, None]) | (
        (density == density[:, None]) & (place < place[:, None])
    )
    parent = torch.where(denser, distance, distance.max()).min(1).values
    centres = (parent * density).argsort(descending=True, stable=True)[:count]
    cluster = distance[centres].sort(dim=0, stable=True).indices[0]
    cluster[centres] = place[:count]
    members = torch.nn.functional.one_hot(cluster, count).to(x.dtype)
    return members.T @ x / (members.sum(0)[:, None] + 1e-6), centres
