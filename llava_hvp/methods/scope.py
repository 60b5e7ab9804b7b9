"""SCOPE: patches that are salient and cover what is not covered yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import number, selected_layer
from llava_hvp.methods.greedy import cosines, covering, mask_of
from llava_hvp.methods.worth import Values, WorthTrying


@dataclass(frozen=True, kw_only=True)
class SCOPE(VisionMethod):
    """SCOPE (arXiv 2510.24214, NeurIPS 2025): saliency times coverage.

    Always the patch whose CLS attention, times what it adds to the coverage of all patches by the
    cosine of their features, is largest. Exactly the budget is kept. It reads no projected patch
    and no prompt.

    Official code: github.com/kinredon/SCOPE@6bf7306 (without a licence file; its setup.py says
    Apache). Departures: heads are averaged (there added up, which orders the same), every tile has
    a budget (there `int(n / tiles)` of a number for all tiles of the call), `alpha` is an option
    (there an environment variable), and its sum instead of the product is not offered.

    Parameters
    ----------
    alpha : float
        power of the saliency, at least 0; 0 leaves coverage alone
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "patches that CLS attends to and that cover the others"
    roles: ClassVar[tuple[str, ...]] = ("covering",)
    needs_cls: ClassVar[bool] = True
    worth_trying: ClassVar[WorthTrying] = {"alpha": Values((0.0, 0.5, 1.0, 2.0))}

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "alpha", least=0, most=100)

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(cls_attention=(selected_layer(depth, feature_layer),), features=True)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        saliency = context.score(
            "cls_attention", selected_layer(context.depth, context.feature_layer)
        )
        similarity = cosines(context.read("features", self.name))
        order = covering(similarity, budget, weight=saliency.pow(self.alpha))
        return Selection.from_roles({"covering": mask_of(order, context.patches)})
