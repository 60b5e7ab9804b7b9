"""How Qwen2.5-VL sees a picture, for drawing: made as large as its grid of tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import PictureError
from llava_hvp.methods.masks import Grid
from llava_hvp.show.frame import Panel

Size = tuple[int, int]


@dataclass(frozen=True)
class GridView:
    """A picture of one grid of tokens.

    Parameters
    ----------
    grid : Grid
        (rows, columns) of tokens
    side : int
        pixels along a token
    """

    grid: Grid
    side: int

    def panels(self, tiles: int, size: Size | None) -> tuple[Panel, ...]:
        """Where the tokens lie."""
        index = torch.arange(self.grid[0] * self.grid[1]).view(self.grid)
        return (Panel("", index, self.side),)

    def describe(self, size: Size) -> str:
        """What becomes of a picture of (width, height), in a line."""
        rows, columns = self.grid
        return (
            f"{size[0]} x {size[1]} pixels, made {columns * self.side} x {rows * self.side} by the "
            "checkpoint's image processor"
        )

    def frame(self, image: Any) -> tuple[Panel, ...]:
        """The panel of a PIL image with its photo."""
        rows, columns = self.grid
        image = image.convert("RGB").resize((columns * self.side, rows * self.side))
        photo = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        shown = photo.view(rows * self.side, columns * self.side, 3)
        (panel,) = self.panels(1, None)
        return (dataclasses.replace(panel, photo=shown),)

    def pixels(self, image: Any) -> Tensor:
        """Raises PictureError: a picture alone does not say what such a tower is given."""
        raise PictureError(
            "the commands do not open checkpoints of this model: prune it from Python, and draw "
            "what was kept with report.overlay(image)"
        )
