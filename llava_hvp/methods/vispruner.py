"""VisPruner: what CLS attends to, and the rest without those most similar to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import number, selected_layer
from llava_hvp.methods.greedy import cosines, mask_of
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor

STEP = 8  # patches dropped at a time, fixed in the official code


@dataclass(frozen=True, kw_only=True)
class VisPruner(VisionMethod):
    """VisPruner (arXiv 2412.01818, from version 2 on; ICCV 2025).

    A share of the budget goes to the patches that CLS attends to most. The others, in the order of
    that attention, are thinned out: every second one is compared with those between, and the eight
    most similar are dropped, until the rest of the budget is left. Exactly the budget is kept.

    The order of the list decides who is compared with whom, so the rule is not stable under
    rounding: another device, dtype or release of torch keeps some other patches.

    Official code: github.com/Theia-4869/VisPruner@aefa01a (Apache-2.0). Departures: a list of odd
    length, at which that code fails, has its longer half compared with the shorter; cosines are
    taken in float32; ties go to the one that is earlier in the list.

    Parameters
    ----------
    important_ratio : float
        share of the budget that attention decides on, in [0, 1]
    """

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "what CLS attends to, and a diverse rest without its doubles"
    roles: ClassVar[tuple[str, ...]] = ("important", "diverse")
    needs_cls: ClassVar[bool] = True
    worth_trying: ClassVar[WorthTrying] = {"important_ratio": Values((0.0, 0.25, 0.5, 0.75, 1.0))}

    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "important_ratio", least=0, most=1)

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(cls_attention=(selected_layer(depth, feature_layer),), features=True)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        scores = context.score(
            "cls_attention", selected_layer(context.depth, context.feature_layer)
        )
        features = context.read("features", self.name)
        important = int(budget * self.important_ratio)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rest = order[:, important:]
        if important == budget:
            rest = rest[:, :0]
        else:
            rest = thinned(rest, cosines(features), budget - important)
        return Selection.from_roles(
            {
                "important": mask_of(order[:, :important], context.patches),
                "diverse": mask_of(rest, context.patches),
            }
        )


def thinned(places: Tensor, similarity: Tensor, count: int) -> Tensor:
    """The `count` of a list of patches that are left when the most similar are dropped.

    Parameters
    ----------
    places : Tensor
        (T, R) patches in the order that decides who is compared with whom
    similarity : Tensor
        (T, N, N) float
    count : int
        how many stay, at least 1
    """
    tiles = torch.arange(len(places), device=places.device)[:, None, None]
    while places.shape[1] > count:
        even, odd = places[:, 0::2], places[:, 1::2]
        drop = min(STEP, places.shape[1] - count, even.shape[1])
        nearest = similarity[tiles, even[:, :, None], odd[:, None]].amax(-1)
        order = nearest.argsort(dim=-1, descending=True, stable=True)
        places = torch.cat([even.gather(-1, order[:, drop:]), odd], dim=-1)
    return places
