"""VisionZip: the patches that CLS attends to, and the others merged into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.errors import ContextError, OptionError
from llava_hvp.lazy import functional, torch
from llava_hvp.methods.base import Mix, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import integer, selected_layer
from llava_hvp.methods.masks import Grid, first_best, indices, top_k

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VisionZip(VisionMethod):
    """VisionZip (arXiv 2412.04467; code dvlab-research/VisionZip@3151f6d).

    Of a budget, one token is CLS, and some are contextual; all others are dominant, the patches
    that CLS attends to most in the layer handed to the projector. The remaining patches are shared
    among the contextual ones, which stand at even steps over them, each going to the one whose
    keys (mean over heads) are most like its own. A contextual token is its own state plus the mean
    of those that came to it.

    The released code cannot do without 24 x 24 patches and one image a call; here any grid and
    batch goes. It sums attention over heads where we take the mean, which orders alike, and sends
    LLaVA-NeXT's tiles without unpad and newlines: `patch_merge="spatial"`.

    Parameters
    ----------
    contextual : int | None
        contextual tokens of a tile; by default 5 of 32 of the budget, as in the 54 + 10 of 64 that
        the authors use
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "CLS, the patches it attends to, and the others merged into a few"
    roles: ClassVar[tuple[str, ...]] = ("dominant", "contextual")
    loose: ClassVar[tuple[str, ...]] = ("contextual",)
    extra_first: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = True

    contextual: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None:
            integer(self, "contextual", least=0)

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        layers = (selected_layer(depth, feature_layer),)
        return Needs(cls_attention=layers, keys=layers)

    def check(self, grid: Grid) -> None:
        patches = grid[0] * grid[1]
        if self.num_tokens is None and self.budget(patches) < patches:
            self.sizes(self.budget(patches))

    def sizes(self, budget: int) -> tuple[int, int]:
        """(dominant patches, contextual tokens) of a budget; the one token left is CLS."""
        contextual = round(5 * budget / 32) if self.contextual is None else self.contextual
        if contextual >= budget:
            raise OptionError(
                f"visionzip: contextual={contextual} and CLS need {contextual + 1} tokens a tile, "
                f"and the budget is {budget}: give a larger budget or fewer contextual tokens"
            )
        return budget - 1 - contextual, contextual

    def choose(self, context: VisionContext, budget: int) -> Selection:
        layer = selected_layer(context.depth, context.feature_layer)
        attention, keys = context.score("cls_attention", layer), context.score("keys", layer)
        if context.heads is None:
            raise ContextError("visionzip needs heads in the context, to take keys apart")
        dominants, contextuals = self.sizes(budget)
        dominant = top_k(attention, dominants)
        extra = keys.new_zeros(keys.shape[:2])
        extra[:, 0] = 1
        if not contextuals:
            added = keys.new_zeros(*attention.shape, keys.shape[1])
            return _selection(Mix(added, extra), dominant, torch.zeros_like(dominant))
        rest = indices(~dominant, context.patches - dominants)
        step = max(1, rest.shape[1] // contextuals)
        targets = rest[:, : contextuals * step : step]
        contextual = torch.zeros_like(dominant).scatter_(1, targets, True)
        metric = keys[:, keys.shape[1] - context.patches :].unflatten(-1, (context.heads, -1))
        added = _merged(metric.mean(-2), targets, ~dominant & ~contextual)
        added = functional.pad(added, (keys.shape[1] - context.patches, 0))
        return _selection(Mix(added, extra), dominant, contextual)


def _selection(mix: Mix, dominant: Tensor, contextual: Tensor) -> Selection:
    return Selection.from_roles({"dominant": dominant, "contextual": contextual}, mix=mix)


def _merged(metric: Tensor, targets: Tensor, members: Tensor) -> Tensor:
    """(T, N, N) weights with which the members flow into the patches at `targets`.

    Parameters
    ----------
    metric : Tensor
        (T, N, d), by whose cosine each member finds its target
    targets : Tensor
        (T, c) indices
    members : Tensor
        (T, N) mask
    """
    metric = functional.normalize(metric, dim=-1)
    wanted = metric.gather(1, targets[..., None].expand(-1, -1, metric.shape[2]))
    nearest = first_best(metric @ wanted.transpose(1, 2))
    each = torch.arange(targets.shape[1], device=targets.device)
    joins = ((nearest[:, None] == each[:, None]) & members[:, None]).to(metric.dtype)
    mean = joins / joins.sum(-1, keepdim=True).clamp_min(1)
    weights = metric.new_zeros(*members.shape, members.shape[1])
    return weights.scatter_(1, targets[..., None].expand_as(mean), mean)
