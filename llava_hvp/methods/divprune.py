"""DivPrune: patches as far from each other as can be had, by the language model's own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import choice
from llava_hvp.methods.greedy import cosines, farthest_first, mask_of
from llava_hvp.methods.worth import Values, WorthTrying


@dataclass(frozen=True, kw_only=True)
class DivPrune(VisionMethod):
    """DivPrune (arXiv 2503.02175, CVPR 2025): the max-min diversity problem, greedily.

    The first patch is the one whose nearest neighbour is farthest, by the cosine distance of
    projected patches; then always the one whose nearest among the chosen is farthest. Exactly the
    budget is kept.

    Official code: github.com/vbdi/divprune@799e2d9, licensed CC BY-NC 4.0, of which nothing is used
    here: this is written from the rule. Departures: a patch is chosen once (there the same one
    again, where fewer differ than are asked for), the image_newlines of LLaVA-NeXT are no
    candidates, and `scope="tile"` is the default, as everywhere here.

    Parameters
    ----------
    scope : str
        "tile" chooses on every tile by itself; "image" once among all tiles of an image, with their
        budgets together, as the official code does with the image as it is packed
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "patches that are as unlike each other as can be had"
    roles: ClassVar[tuple[str, ...]] = ("diverse",)
    worth_trying: ClassVar[WorthTrying] = {"scope": Values(("tile", "image"))}

    scope: str = "tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "scope", ("tile", "image"))

    @property
    def of_image(self) -> bool:
        return self.scope == "image"

    def budget(self, patches: int, tiles: int = 1) -> int:
        share = super().budget(patches, tiles)
        return share * tiles if self.of_image else share

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(projected=True)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        projected = context.read("projected", self.name)
        if self.of_image:
            projected = projected.reshape(len(context.images), -1, projected.shape[-1])
        mask = mask_of(farthest_first(cosines(projected), budget), projected.shape[1])
        return Selection.from_roles({"diverse": mask.view(-1, context.patches)})
