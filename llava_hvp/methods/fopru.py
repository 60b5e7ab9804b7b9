"""FoPru: the patches that the other patches attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.errors import OptionError
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import choice, selected_layer
from llava_hvp.methods.masks import Grid, top_k
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FoPru(VisionMethod):
    """FoPru (arXiv 2411.14164, "Focal Pruning").

    No official code exists. Both readings of the paper are by other hands: "softmax" is how HIVTP
    (arXiv 2509.23663, Section 2.2) describes it, "logits" is dongxianzhe/hydrainfer@d4d5f4f, whose
    paper shares authors with FoPru's. They keep quite different patches; say which one a figure is
    of.

    The score of a patch is the mean attention that it receives from patches, CLS left out, in the
    layer handed to the projector. The budget's best patches are kept.

    Parameters
    ----------
    strategy : str
        "rank" keeps the best patches; "row" the grid's rows with the largest sums, as many whole
        rows as the budget holds
    attention : str
        "softmax" takes attention as the encoder does; "logits" takes queries times keys before the
        softmax, and of the means that a patch receives and gives the one that varies more over the
        tile
    """

    name: ClassVar[str] = "fopru"
    summary: ClassVar[str] = "what patches attend to; as HIVTP describes it, no official code"
    roles: ClassVar[tuple[str, ...]] = ("focal",)
    needs_cls: ClassVar[bool] = True
    worth_trying: ClassVar[WorthTrying] = {
        "strategy": Values(("rank", "row")),
        "attention": Values(("softmax", "logits")),
    }

    strategy: str = "rank"
    attention: str = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "strategy", ("rank", "row"))
        choice(self, "attention", ("softmax", "logits"))

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        layers = (selected_layer(depth, feature_layer),)
        if self.attention == "logits":
            return Needs(keys=layers, queries=layers)
        return Needs(received_attention=layers, cls_attention=layers)

    def check(self, grid: Grid) -> None:
        patches = grid[0] * grid[1]
        if self.num_tokens is None and self.budget(patches) < patches:
            self._rows(grid, self.budget(patches))

    def _rows(self, grid: Grid, budget: int) -> int:
        """How many rows of the grid a budget holds."""
        rows = budget // grid[1]
        if self.strategy == "row" and rows < 1:
            raise OptionError(
                f"fopru: strategy='row' keeps whole rows of {grid[1]} patches, and the budget is "
                f"{budget}: give at least {grid[1]}, or strategy='rank'"
            )
        return rows

    def choose(self, context: VisionContext, budget: int) -> Selection:
        score = self._score(context)
        if self.strategy == "rank":
            return Selection.from_roles({"focal": top_k(score, budget)})
        by_row = score.unflatten(1, context.grid).sum(-1)
        chosen = top_k(by_row, self._rows(context.grid, budget))
        return Selection.from_roles({"focal": chosen.repeat_interleave(context.grid[1], dim=1)})

    def _score(self, context: VisionContext) -> Tensor:
        """(T, N) float32, but for a factor that is the same for all patches."""
        layer, patches = selected_layer(context.depth, context.feature_layer), context.patches
        if self.attention == "softmax":
            received, cls = (
                context.score("received_attention", layer),
                context.score("cls_attention", layer),
            )
            return (patches + 1) * received - cls
        keys, queries = (context.score(kind, layer)[:, -patches:] for kind in ("keys", "queries"))
        # Head by head products add up to those over the whole width. Sums of products and no
        # matrix product, whose roundings may depend on the batch.
        received = (queries.sum(1, keepdim=True) * keys).sum(-1)
        given = (keys.sum(1, keepdim=True) * queries).sum(-1)
        varies = received.var(1, keepdim=True) >= given.var(1, keepdim=True)
        return received.where(varies, given)
