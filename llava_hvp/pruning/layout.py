"""How LLaVA lays out the tokens of an image, as indices: what stock would send, in its order.

A token is named by its patch, `tile * N + patch` counted over the image's own tiles; NEWLINE stands
for an `image_newline`. LLaVA's own `unpad_image` and grid shape do the arithmetic.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.llava_arch import unpad_image
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.masks import Grid

NEWLINE = -1
Size = tuple[int, int]  # (width, height) in pixels, as LLaVA's image_sizes


@dataclass(frozen=True)
class Layout:
    """The tokens of one image before pruning.

    base : (n,) int64, patches that come first, in order
    mosaic : (rows, columns) int64, the sub-images as one picture, or None. Of thin pictures unpad
        leaves no row or no column
    newline : whether an image_newline ends each mosaic row (without a mosaic: the image)
    """

    base: Tensor
    mosaic: Tensor | None = None
    newline: bool = False

    @property
    def stock_tokens(self) -> int:
        """Tokens that unpruned LLaVA sends."""
        if self.mosaic is None:
            return len(self.base) + self.newline
        rows, columns = self.mosaic.shape
        return len(self.base) + rows * (columns + self.newline)

    def stock(self, patches: int) -> Tensor:
        """(patches,) bool of an image of so many patches: those that unpruned LLaVA sends."""
        sent = torch.zeros(patches, dtype=torch.bool)
        sent[self.base] = True
        if self.mosaic is not None:
            sent[self.mosaic.flatten()] = True
        return sent

    def kept(self, keep: Tensor, newline: str) -> Tensor:
        """(tokens,) int64, the tokens that stay, in order.

        Parameters
        ----------
        keep : (tiles * N,) bool, on the CPU
        newline : "all" keeps every one, "none" none, "rows" those of rows that did not lose all
            their patches; a row in which stock sends nothing else has none to lose
        """
        base = self.base[keep[self.base]]
        if self.mosaic is None:
            ends = self.newline and newline != "none"
            return torch.cat((base, torch.full((int(ends),), NEWLINE)))
        table, stays = self.mosaic, keep[self.mosaic]
        if self.newline:
            occupied = stays.any(1, keepdim=True)
            edge = {
                "rows": occupied if table.shape[1] else torch.ones_like(occupied),
                "all": torch.ones_like(occupied),
                "none": torch.zeros_like(occupied),
            }[newline]
            stays = torch.cat((stays, edge), dim=1)
            table = torch.cat((table, table.new_full((len(table), 1), NEWLINE)), dim=1)
        return torch.cat((base, table[stays]))


@dataclass(frozen=True)
class Arrangement:
    """What decides on the layout besides the image: the model's config and the tower.

    merge_type, aspect_ratio, pinpoints : of the config
    grid, image_side : patches and pixels of a tile
    """

    merge_type: str
    aspect_ratio: str
    pinpoints: str
    grid: Grid
    image_side: int

    @classmethod
    def of(cls, config: Any, grid: Grid, image_side: int) -> Arrangement:
        """Read LLaVA's config with LLaVA's own defaults."""
        return cls(
            getattr(config, "mm_patch_merge_type", "flat"),
            getattr(config, "image_aspect_ratio", "square"),
            str(getattr(config, "image_grid_pinpoints", None)),
            grid,
            image_side,
        )


@functools.lru_cache(maxsize=256)
def layout(arrangement: Arrangement, tiles: int, size: Size | None, merge: str) -> Layout:
    """The layout of one image of `tiles` tiles.

    Parameters
    ----------
    size : (width, height) of the picture; AnyRes needs it
    merge : "stock", or "spatial" for several tiles with neither unpad nor newline

    Raises
    ------
    UnsupportedModelError : what stock LLaVA refuses as well: a merge type or aspect ratio that it
        does not know, tiles that do not fit the image's size
    """
    patches = arrangement.grid[0] * arrangement.grid[1]
    if arrangement.merge_type == "flat":
        return Layout(torch.arange(tiles * patches))
    if not arrangement.merge_type.startswith("spatial"):
        raise UnsupportedModelError(
            f"mm_patch_merge_type={arrangement.merge_type!r} in the model's config: LLaVA knows "
            "flat, spatial and spatial_unpad"
        )
    unpad = merge == "stock" and "unpad" in arrangement.merge_type
    base = torch.arange(patches)
    if tiles == 1:
        return Layout(base, newline=unpad)
    table = mosaic(arrangement, tiles, size)
    if unpad:
        table = unpad_image(table[None], size)[0]
    return Layout(base, table, newline=unpad)


def mosaic(arrangement: Arrangement, tiles: int, size: Size | None) -> Tensor:
    """(rows, columns) int64: the sub-images side by side as AnyRes cut them, padding included."""
    if arrangement.aspect_ratio != "anyres" or size is None:
        raise UnsupportedModelError(
            f"an image of {tiles} tiles with image_aspect_ratio={arrangement.aspect_ratio!r} and "
            f"image size {size}: LLaVA lays out several tiles for 'anyres' only, by image_sizes"
        )
    pinpoints = ast.literal_eval(arrangement.pinpoints)
    across, down = get_anyres_image_grid_shape(size, pinpoints, arrangement.image_side)
    if across * down != tiles - 1:
        raise UnsupportedModelError(
            f"an image of {size[0]} x {size[1]} pixels has {across} x {down} sub-images by the "
            f"model's image_grid_pinpoints, but {tiles - 1} came: pass these images' image_sizes"
        )
    rows, columns = arrangement.grid
    table = torch.arange(rows * columns, tiles * rows * columns).view(down, across, rows, columns)
    return table.transpose(1, 2).reshape(down * rows, across * columns)


def sizes_of(image_sizes: Sequence[Any] | None, images: int) -> list[Size | None]:
    """LLaVA's `image_sizes` as (width, height) for each of `images` images, None where unknown."""
    if image_sizes is None:
        return [None] * images
    return [(int(size[0]), int(size[1])) for size in image_sizes]
