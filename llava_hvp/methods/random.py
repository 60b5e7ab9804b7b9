"""Random: the floor that every method must beat, and the yardstick for its overhead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.lazy import torch
from llava_hvp.methods.base import Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import integer
from llava_hvp.methods.masks import top_k

LARGEST_SEED = 2**64 - 1  # of torch's generators


@dataclass(frozen=True, kw_only=True)
class Random(VisionMethod):
    """Patches drawn without replacement; captures nothing.

    Parameters
    ----------
    seed : int
        of the draw, from 0 to 2**64 - 1. Tile i of every image draws the same patches, so that a
        run is repeatable on every device and in every batch.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "patches drawn by a seeded generator; captures nothing"
    roles: ClassVar[tuple[str, ...]] = ("random",)

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer(self, "seed", least=0, most=LARGEST_SEED)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        images = context.tiles or (context.total_tiles,)
        generator = torch.Generator().manual_seed(self.seed)
        draws = [torch.rand(context.patches, generator=generator) for _ in range(max(images))]
        scores = torch.cat([torch.stack(draws[:tiles]) for tiles in images])
        return Selection.from_roles({"random": top_k(scores, budget).to(context.device)})
