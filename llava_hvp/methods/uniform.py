"""Uniform: patches at even steps, the other reference that captures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.lazy import torch
from llava_hvp.methods.base import Selection, VisionContext, VisionMethod


@dataclass(frozen=True, kw_only=True)
class Uniform(VisionMethod):
    """Patches at even steps over the raster, from the first; captures nothing."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "patches at even steps over the raster; captures nothing"
    roles: ClassVar[tuple[str, ...]] = ("uniform",)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        steps = torch.arange(budget, device=context.device) * context.patches // budget
        keep = torch.zeros(
            context.total_tiles, context.patches, dtype=torch.bool, device=context.device
        )
        keep[:, steps] = True
        return Selection.from_roles({"uniform": keep})
