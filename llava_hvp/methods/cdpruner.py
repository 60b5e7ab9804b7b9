"""CDPruner: patches that are diverse given what the prompt asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import choice
from llava_hvp.methods.greedy import cosines, determinantal, mask_of
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CDPruner(VisionMethod):
    """CDPruner (arXiv 2506.10967, NeurIPS 2025): conditional diversity.

    Greedy MAP of a determinantal point process on each tile: its kernel is the cosine of projected
    patches, times the relevance of both, which is scaled to [0, 1] over all tiles of an image.
    Exactly the budget is kept.

    Official code: github.com/Theia-4869/CDPruner@9541616 (Apache-2.0). Departures: relevance is
    scaled over one image (there over all images of the call, nan where all are equal, here 1); who
    lies in the span of the chosen is left to the end, and then the most relevant fill the budget
    (there rounding ends in nan, and fewer are kept than asked for).

    Parameters
    ----------
    sign : str
        "negated" as published: in CLIP's space the patches that show what is asked for have the
        smaller cosine with the prompt; "direct" for an encoder that was trained otherwise
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "diverse patches, weighted by what the prompt asks for"
    roles: ClassVar[tuple[str, ...]] = ("diverse",)
    worth_trying: ClassVar[WorthTrying] = {"sign": Values(("negated", "direct"))}

    sign: str = "negated"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "sign", ("direct", "negated"))

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(projected=True, relevance="clip")

    def choose(self, context: VisionContext, budget: int) -> Selection:
        projected = context.read("projected", self.name)
        relevance = context.read("relevance", self.name)
        if self.sign == "negated":
            relevance = -relevance
        quality = scaled(relevance, context.images)
        order = determinantal(cosines(projected), quality, budget)
        return Selection.from_roles({"diverse": mask_of(order, context.patches)})


def scaled(scores: Tensor, images: tuple[int, ...]) -> Tensor:
    """Scores (T, N) brought to [0, 1] over all tiles of each image; 1 where all are equal.

    A millionth is added above the line, so that the least of them is not 0.

    Parameters
    ----------
    images : tuple[int, ...]
        tiles of each image
    """
    of_tile = [image for image, tiles in enumerate(images) for _ in range(tiles)]
    index = torch.tensor(of_tile, device=scores.device)
    none = scores.new_zeros(len(images))
    low = none.scatter_reduce(0, index, scores.amin(-1), "amin", include_self=False)[index]
    high = none.scatter_reduce(0, index, scores.amax(-1), "amax", include_self=False)[index]
    span = (high - low)[:, None]
    return torch.where(span > 0, (scores - low[:, None] + 1e-6) / span, 1.0)
