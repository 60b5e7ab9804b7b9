"""Everything: what stands at the vision tower where only the language model prunes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.errors import OptionError
from llava_hvp.methods.base import Selection, VisionContext, VisionMethod


@dataclass(frozen=True, kw_only=True)
class Everything(VisionMethod):
    """Keeps every patch, bit for bit as stock does; nobody asks for it by name."""

    name: ClassVar[str] = "everything"
    summary: ClassVar[str] = "every patch"
    roles: ClassVar[tuple[str, ...]] = ("kept",)
    listed: ClassVar[bool] = False

    r_max: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps_all:
            raise OptionError(f"{self.name}: keeps all and takes no budget: leave it out")

    def choose(self, context: VisionContext, budget: int) -> Selection:
        raise AssertionError("a budget of all is met without a choice")
