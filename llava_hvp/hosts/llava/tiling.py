"""How LLaVA cuts an image into tiles and lays out their tokens, as indices.

LLaVA's own `unpad_image` and grid shape do the arithmetic.
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
from llava_hvp.pruning.layout import Layout, Size


@dataclass(frozen=True)
class TilingConfig:
    """What decides on the layout besides the image: the model's config and the tower.

    Parameters
    ----------
    merge_type, aspect_ratio, pinpoints : str
        of the config
    grid, image_side : Grid | int
        patches and pixels of a tile
    """

    merge_type: str
    aspect_ratio: str
    pinpoints: str
    grid: Grid
    image_side: int

    @classmethod
    def of(cls, config: Any, grid: Grid, image_side: int) -> TilingConfig:
        """Read LLaVA's config with LLaVA's own defaults."""
        return cls(
            getattr(config, "mm_patch_merge_type", "flat"),
            getattr(config, "image_aspect_ratio", "square"),
            str(getattr(config, "image_grid_pinpoints", None)),
            grid,
            image_side,
        )


@functools.lru_cache(maxsize=256)
def layout(tiling: TilingConfig, tiles: int, size: Size | None, merge: str) -> Layout:
    """The layout of one image of `tiles` tiles.

    Parameters
    ----------
    size : Size | None
        (width, height) of the picture; AnyRes needs it
    merge : str
        "stock", or "spatial" for several tiles with neither unpad nor newline

    Raises
    ------
    UnsupportedModelError
        what stock LLaVA refuses as well: a merge type or aspect ratio that it does not know, tiles
        that do not fit the image's size
    """
    patches = tiling.grid[0] * tiling.grid[1]
    if tiling.merge_type == "flat":
        return Layout(torch.arange(tiles * patches))
    if not tiling.merge_type.startswith("spatial"):
        raise UnsupportedModelError(
            f"mm_patch_merge_type={tiling.merge_type!r} in the model's config: LLaVA knows "
            "flat, spatial and spatial_unpad"
        )
    unpad = merge == "stock" and "unpad" in tiling.merge_type
    base = torch.arange(patches)
    if tiles == 1:
        return Layout(base, newline=unpad)
    table = mosaic(tiling, tiles, size)
    if unpad:
        table = unpad_image(table[None], size)[0]
    return Layout(base, table, newline=unpad)


def arrangement(tiling: TilingConfig, tiles: int, size: Size | None) -> Grid | None:
    """(down, across) of the sub-images of an image; None where its tiles stand alone."""
    if tiles == 1 or tiling.merge_type == "flat":
        return None
    return _cut(tiling, tiles, size)


def padding(tiling: TilingConfig, size: Size | None) -> Tensor:
    """(N,) bool, the patches of a tile that lie in the padding of `image_aspect_ratio="pad"`.

    A patch that shows a sliver of the picture is none of them.

    Parameters
    ----------
    size : Size | None
        (width, height) of the picture

    Raises
    ------
    UnsupportedModelError
        pictures are padded, and the size is not known
    """
    empty = torch.zeros(tiling.grid, dtype=torch.bool)
    if tiling.aspect_ratio != "pad":
        return empty.flatten()
    if size is None:
        raise UnsupportedModelError(
            "the method passes over padding, and image_aspect_ratio='pad' pads pictures by their "
            "sizes: pass these images' image_sizes"
        )
    across, down = (
        _in_padding(side, max(size), patches, tiling.image_side)
        for side, patches in zip(size, tiling.grid[::-1], strict=True)
    )
    return (empty | down[:, None] | across).flatten()


def _in_padding(length: int, square: int, patches: int, image_side: int) -> Tensor:
    """(patches,) bool along one side of the tile: those that no pixel of the picture reaches.

    As LLaVA's `expand2square` centres `length` pixels in `square` of them.
    """
    before = (square - length) // 2
    ends = torch.arange(patches + 1) * (image_side // patches) * square
    return (ends[1:] <= before * image_side) | (ends[:-1] >= (before + length) * image_side)


def _cut(tiling: TilingConfig, tiles: int, size: Size | None) -> Grid:
    """(down, across) of the sub-images as AnyRes cut them."""
    if tiling.aspect_ratio != "anyres" or size is None:
        raise UnsupportedModelError(
            f"an image of {tiles} tiles with image_aspect_ratio={tiling.aspect_ratio!r} and "
            f"image size {size}: LLaVA lays out several tiles for 'anyres' only, by image_sizes"
        )
    pinpoints = ast.literal_eval(tiling.pinpoints)
    across, down = get_anyres_image_grid_shape(size, pinpoints, tiling.image_side)
    if across * down != tiles - 1:
        raise UnsupportedModelError(
            f"an image of {size[0]} x {size[1]} pixels has {across} x {down} sub-images by the "
            f"model's image_grid_pinpoints, but {tiles - 1} came: pass these images' image_sizes"
        )
    return down, across


def mosaic(tiling: TilingConfig, tiles: int, size: Size | None) -> Tensor:
    """(rows, columns) int64: the sub-images side by side as AnyRes cut them, padding included."""
    down, across = _cut(tiling, tiles, size)
    rows, columns = tiling.grid
    table = torch.arange(rows * columns, tiles * rows * columns).view(down, across, rows, columns)
    return table.transpose(1, 2).reshape(down * rows, across * columns)


def sizes_of(image_sizes: Sequence[Any] | None, images: int) -> list[Size | None]:
    """LLaVA's `image_sizes` as (width, height) for each of `images` images, None where unknown."""
    if image_sizes is None:
        return [None] * images
    return [(int(size[0]), int(size[1])) for size in image_sizes]
