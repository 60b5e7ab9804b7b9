"""FasterVLM: the patches that the CLS token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import selected_layer
from llava_hvp.methods.masks import top_k


@dataclass(frozen=True, kw_only=True)
class FasterVLM(VisionMethod):
    """FasterVLM (arXiv 2412.01818v1; later versions of that paper are VisPruner).

    Keeps the patches to which CLS pays most attention in the layer handed to the projector.
    Exactly the budget is kept.

    Official code: github.com/Theia-4869/FasterVLM@f5d5f12 (Apache-2.0), whose setting is the
    number of patches of a tile: 144, 58, 29. Departures: heads are averaged in float32 (there in
    the images' dtype), and ties go to the lower index.
    """

    name: ClassVar[str] = "fastervlm"
    summary: ClassVar[str] = "the patches that CLS attends to most"
    roles: ClassVar[tuple[str, ...]] = ("attended",)
    needs_cls: ClassVar[bool] = True

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(cls_attention=(selected_layer(depth, feature_layer),))

    def choose(self, context: VisionContext, budget: int) -> Selection:
        layer = selected_layer(context.depth, context.feature_layer)
        return Selection.from_roles(
            {"attended": top_k(context.score("cls_attention", layer), budget)}
        )
