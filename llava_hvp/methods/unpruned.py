"""Unpruned: every patch stays; what `none` is where the tiling or the packing is not stock's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.methods.base import Selection, VisionContext, VisionMethod


@dataclass(frozen=True, kw_only=True)
class Unpruned(VisionMethod):
    """Every patch of every tile, whatever the budget; a paper's baseline in the paper's protocol.

    No method: it is had as `none`, beside options of a Runtime that change what LLaVA sends.
    """

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "unpruned LLaVA"
    roles: ClassVar[tuple[str, ...]] = ("unpruned",)
    listed: ClassVar[bool] = False

    def _has_budget(self) -> bool:
        return True

    @property
    def keeps_all(self) -> bool:
        """True: there is no budget to keep."""
        return True

    def budget(self, patches: int, tiles: int = 1) -> int:
        """All patches of a tile."""
        return patches

    def choose(self, context: VisionContext, budget: int) -> Selection:
        raise AssertionError("a budget of all patches leaves nothing to choose")
