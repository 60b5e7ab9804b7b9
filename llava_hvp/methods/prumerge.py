"""PruMerge: the patches that CLS asks for, each with the patches like it merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.errors import OptionError
from llava_hvp.lazy import functional, torch
from llava_hvp.methods.base import Mix, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import integer, next_layer, switch
from llava_hvp.methods.masks import indices, ranks, top_k
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PruMerge(VisionMethod):
    """LLaVA-PruMerge (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge@097c041).

    A patch's score is CLS's attention to it by queries and keys of the layer after the one handed
    to the projector; they are made of that one's output, and the layer itself is not run. As in
    the released code it is one softmax over the whole width, heads not separated. The best patches
    are kept; each takes in the patches whose keys are most like its own, kept ones included,
    weighted by their scores (which do not sum to one). One token more a tile is the weighted sum
    of all patches not kept. Tokens are sent best first, that one last.

    A budget counts that token: of 145 tokens 144 are patches. The released code takes the share of
    outliers over all tiles of a call; here each tile has its own, so that a batch gives what
    single images give. On an encoder whose last layer is handed on, that layer's own queries and
    keys are read.

    Parameters
    ----------
    adaptive : bool
        keep the patches whose score is an outlier (above Q3 + 1.5 (Q3 - Q1) of the tile), however
        many they are, instead of a budget
    neighbours : int
        patches that each kept one takes in
    """

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "the patches that CLS asks for, with those like them merged in"
    roles: ClassVar[tuple[str, ...]] = ("important",)
    loose: ClassVar[tuple[str, ...]] = ("important",)
    needs_cls: ClassVar[bool] = True
    worth_trying: ClassVar[WorthTrying] = {"neighbours": Values((0, 8, 16, 32, 64))}

    adaptive: bool = False
    neighbours: int = 32

    def __post_init__(self) -> None:
        switch(self, "adaptive")
        if self.adaptive and (self.r_max is not None or self.num_tokens is not None):
            raise OptionError(
                f"{self.name}: adaptive=True lets the image decide how many tokens stay, and "
                f"excludes r_max={self.r_max!r} and num_tokens={self.num_tokens!r}: give one"
            )
        super().__post_init__()
        integer(self, "neighbours", least=0)

    def _has_budget(self) -> bool:
        return self.adaptive or super()._has_budget()

    def _has_plain_budget(self) -> bool:
        return not self.adaptive

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        layers = (next_layer(depth, feature_layer),)
        return Needs(keys=layers, queries=layers)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        layer = next_layer(context.depth, context.feature_layer)
        keys = context.score("keys", layer)
        scores = cls_attention(context.score("queries", layer)[:, 0], keys)
        patches = keys[:, keys.shape[1] - context.patches :]
        roles = self._roles(scores, budget)
        kept = torch.stack(tuple(roles.values())).any(0)
        most = context.patches if self.adaptive else budget - 1
        added = self._merged(scores, patches, kept, most)
        cls = (keys.shape[1] - context.patches, 0)
        extra = functional.pad(scores.masked_fill(kept, 0), cls)
        mix = Mix(functional.pad(added, cls), extra, self._order(scores, roles))
        return Selection.from_roles(roles, mix=mix)

    def _roles(self, scores: Tensor, budget: int) -> dict[str, Tensor]:
        important = outliers(scores) if self.adaptive else top_k(scores, budget - 1)
        return {"important": important}

    def _order(self, scores: Tensor, roles: dict[str, Tensor]) -> Tensor:
        return ranks(scores)

    def _merged(self, scores: Tensor, keys: Tensor, kept: Tensor, most: int) -> Tensor:
        """(T, N, N) weights with which patches flow into the kept ones, at most `most` a tile."""
        keys = functional.normalize(keys, dim=-1)
        rows = indices(kept, most)
        of_rows = rows[..., None]
        likeness = keys.gather(1, of_rows.expand(-1, -1, keys.shape[2])) @ keys.transpose(1, 2)
        itself = torch.zeros_like(likeness, dtype=torch.bool).scatter_(2, of_rows, True)
        nearest = top_k(likeness, self.neighbours, among=~itself)
        weights = scores[:, None] * (nearest & kept.gather(1, rows)[..., None])
        return keys.new_zeros(*kept.shape, kept.shape[1]).scatter_(
            1, of_rows.expand_as(weights), weights
        )


def cls_attention(query: Tensor, keys: Tensor) -> Tensor:
    """(T, S - 1) share of each patch in one softmax over all states; CLS's own share is left out.

    Parameters
    ----------
    query : Tensor
        (T, D), CLS's
    keys : Tensor
        (T, S, D)
    """
    # A sum of products and not a matrix product, whose roundings may depend on the batch.
    logits = (query[:, None] * keys).sum(-1) * keys.shape[2] ** -0.5
    return logits.softmax(-1)[:, 1:]


def outliers(scores: Tensor) -> Tensor:
    """Mask of the scores above the third quartile by 1.5 times the distance of both quartiles."""
    low, high = scores.quantile(scores.new_tensor([0.25, 0.75]), dim=1)[..., None]
    return scores > high + 1.5 * (high - low)
