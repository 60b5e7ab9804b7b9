"""PruMerge+: PruMerge with samples over the raster besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.lazy import torch
from llava_hvp.methods.masks import ranks, top_k
from llava_hvp.methods.prumerge import PruMerge, outliers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """LLaVA-PruMerge+ (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge@097c041).

    PruMerge, and patches at even steps over the raster besides, about three for each important
    one. Important ones are sent first, best first, then the samples in raster order, then the
    rest.

    The released code has no budget that works at every size. Of ours, the token of the rest
    aside, a quarter is important, and the others stand at even steps over the patches left. With
    `adaptive=True` it is the released rule: every `N // outliers // 3`-th patch but the last. Where
    more than a sixth of the patches are outliers that is every patch, and nothing is pruned.
    """

    name: ClassVar[str] = "prumerge+"
    summary: ClassVar[str] = "PruMerge, and patches at even steps besides"
    roles: ClassVar[tuple[str, ...]] = ("important", "sampled")
    loose: ClassVar[tuple[str, ...]] = ("important", "sampled")

    def _roles(self, scores: Tensor, budget: int) -> dict[str, Tensor]:
        if self.adaptive:
            important = outliers(scores)
            return {"important": important, "sampled": _every_few(important) & ~important}
        important = top_k(scores, round((budget - 1) / 4))
        samples = budget - 1 - round((budget - 1) / 4)
        return {"important": important, "sampled": _evenly(~important, samples, budget)}

    def _order(self, scores: Tensor, roles: dict[str, Tensor]) -> Tensor:
        patches = scores.shape[1]
        places = torch.arange(patches, device=scores.device)
        return ranks(scores).where(roles["important"], patches + places)


def _every_few(important: Tensor) -> Tensor:
    """Mask of every `step`-th patch below the last; the more important ones, the closer."""
    patches = important.shape[1]
    step = patches // important.sum(1, keepdim=True).clamp_min(1) // 3
    places = torch.arange(patches, device=important.device)
    return (places % step.clamp_min(1) == 0) & (places < patches - 1)


def _evenly(left: Tensor, count: int, budget: int) -> Tensor:
    """Mask of `count` patches at even steps over those of `left`, in raster order."""
    number = left.shape[1] - (budget - 1 - count)  # the same in every tile
    chosen = torch.zeros(number, dtype=torch.bool)
    chosen[[step * number // count for step in range(count)]] = True
    nth = left.cumsum(1) - 1
    return left & chosen.to(left.device)[nth.clamp_min(0)]
