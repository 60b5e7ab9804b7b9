"""What differs between the pruned classes of transformers: tiles, and where their tokens stand.

The arithmetic of AnyRes is transformers' own, run on indices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.images import Images
from llava_hvp.hosts.hf.qwen.images import QwenImages
from llava_hvp.hosts.hf.qwen.tower import QwenTower
from llava_hvp.hosts.hf.tower import PrunedVisionTower
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.layout import NEWLINE, Layout, Size
from llava_hvp.pruning.shrunk import Shrunk


class Llava:
    """`LlavaForConditionalGeneration`: an image is one tile, its patches in a row."""

    tower: Any = PrunedVisionTower
    images: Any = Images
    newline = False
    beside: tuple[str, ...] = ()  # arguments of a call that describe its pixels
    keeps_positions = False  # whether tokens that stay keep their positions; else these close up
    prunes_inside = True  # whether a method may drop tokens inside the language model

    @staticmethod
    def tiles(
        inner: Any, pixels: Tensor, sizes: Sequence[Size | None], beside: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """All tiles, (T, 3, H, W), and how many each image has."""
        if pixels.ndim != 4:
            raise UnsupportedModelError(
                f"pixel_values of shape {tuple(pixels.shape)}: LlavaForConditionalGeneration takes "
                "(images, 3, H, W)"
            )
        return pixels, (1,) * len(pixels)

    @staticmethod
    def mosaic(inner: Any, tiles: int, size: Size | None) -> Grid | None:
        """None: there are no tiles behind the first."""
        return None

    @staticmethod
    def layout(inner: Any, grid: Grid, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens of one image."""
        return Layout(torch.arange(grid[0] * grid[1]))


class LlavaNext:
    """`LlavaNextForConditionalGeneration`: a base tile, then the mosaic of AnyRes, unpadded."""

    tower: Any = PrunedVisionTower
    images: Any = Images
    newline = True
    beside: tuple[str, ...] = ("image_sizes",)
    keeps_positions = False
    prunes_inside = True

    @classmethod
    def tiles(
        cls, inner: Any, pixels: Tensor, sizes: Sequence[Size | None], beside: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """All tiles, (T, 3, H, W), and how many each image has; padding tiles left out.

        Raises UnsupportedModelError where the tiles are not those of the sizes.
        """
        counts = tuple(
            1 + _product(cls.mosaic(inner, 2, size)) if cut else 1
            for size, cut in zip(sizes, cls.cut(len(sizes), beside), strict=True)
        )
        if pixels.ndim == 5:
            fits = len(pixels) == len(counts) and pixels.shape[1] >= max(counts)
            stacks = [stack[:n] for stack, n in zip(pixels, counts, strict=False)]
        else:
            fits, stacks = pixels.ndim == 4 and len(pixels) == sum(counts), [pixels]
        side = inner.config.vision_config.image_size
        if not fits or pixels.shape[-2:] != (side, side):
            raise UnsupportedModelError(
                f"pixel_values of shape {tuple(pixels.shape)} for image_sizes {list(sizes)} as "
                f"(width, height): by the config's image_grid_pinpoints they are {list(counts)} "
                f"tiles of {side} x {side}; take both from one processor, whose "
                "image_grid_pinpoints are the model's"
            )
        return torch.cat(stacks), counts

    @staticmethod
    def cut(images: int, beside: Mapping[str, Any]) -> Sequence[bool]:
        """Of each image, whether AnyRes cuts it into tiles."""
        return [True] * images

    @staticmethod
    def mosaic(inner: Any, tiles: int, size: Size | None) -> Grid | None:
        """(down, across) of the tiles behind the first, as AnyRes cut them."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        if tiles == 1:
            return None
        if size is None:
            raise UnsupportedModelError(
                "LLaVA-NeXT lays out an image's tiles by its size: pass image_sizes, as the "
                "processor gives them"
            )
        config = inner.config
        shape = get_anyres_image_grid_shape(
            size[::-1], config.image_grid_pinpoints, config.vision_config.image_size
        )
        return int(shape[0]), int(shape[1])

    @classmethod
    def layout(cls, inner: Any, grid: Grid, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens of one image: the model's own `pack_image_features` on patches' numbers."""
        rows, columns = grid
        patches = rows * columns
        index = torch.arange(tiles * patches)
        base = index[:patches]
        arrangement = cls.mosaic(inner, tiles, size)
        if arrangement is None or size is None:
            return Layout(base, newline=merge == "stock")
        if merge == "spatial":
            table = index[patches:].view(*arrangement, rows, columns).transpose(1, 2)
            return Layout(base, table.reshape(arrangement[0] * rows, -1))
        packed, _ = type(inner).pack_image_features(
            inner,
            [index.view(tiles, patches, 1)],
            [size[::-1]],
            image_newline=torch.tensor([NEWLINE]),
            **cls.packed_by(inner),
        )
        tokens = packed[0][patches:, 0]
        lines = int((tokens == NEWLINE).sum())
        table = tokens.view(lines, -1)[:, :-1] if lines else tokens[None, :0]
        return Layout(base, table, True)

    @staticmethod
    def packed_by(inner: Any) -> dict[str, Any]:
        """Further arguments of `pack_image_features`."""
        return {"vision_feature_select_strategy": "default"}


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`: AnyRes of one image in a row; of several, none."""

    beside = ("image_sizes", "batch_num_images")
    prunes_inside = False

    @staticmethod
    def cut(images: int, beside: Mapping[str, Any]) -> Sequence[bool]:
        """Of each image, whether it stands alone in its row, by `batch_num_images`."""
        rows = beside.get("batch_num_images")
        if rows is None:
            return [True] * images
        counts = [int(count) for count in rows]
        if sum(counts) != images:
            raise UnsupportedModelError(
                f"batch_num_images={counts} for {images} images: give as many as the rows hold"
            )
        return [count == 1 for count in counts for _ in range(count)]

    @staticmethod
    def packed_by(inner: Any) -> dict[str, Any]:
        """A limit that no mosaic reaches: numbers of patches cannot be interpolated."""
        return {"vision_aspect_ratio": "anyres_max_1000000"}

    @classmethod
    def layout(cls, inner: Any, grid: Grid, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens of one image; the mosaic of a large one shrunk, as stock does it."""
        place = super().layout(inner, grid, tiles, size, merge)
        if place.mosaic is None or size is None or merge != "stock":
            return place
        limit = inner.config.vision_aspect_ratio
        rows, columns = place.mosaic.shape
        most = int(limit.removeprefix("anyres_max_")) * grid[0] ** 2
        ratio = math.sqrt(rows * columns / most)
        if ratio <= 1.1:
            return place
        small = int(rows // ratio), int(columns // ratio)
        shrink = functools.partial(_packed, inner, size, limit)
        shrunk = Shrunk(size, small, place.mosaic, shrink)
        first = tiles * grid[0] * grid[1]
        tokens = torch.arange(first, first + shrunk.tokens).view(small)
        return Layout(place.base, tokens, True, shrunk)


class Qwen:
    """`Qwen2_5_VLForConditionalGeneration`: an image is one grid of tokens, of its own size."""

    tower: Any = QwenTower
    images: Any = QwenImages
    newline = False
    beside: tuple[str, ...] = ("image_grid_thw",)
    keeps_positions = True
    prunes_inside = False


def _packed(inner: Any, size: Size, limit: str, values: Tensor) -> Tensor:
    """(tokens, D) of the mosaic of (T, N, D) values, as stock packs features."""
    packed, _ = type(inner).pack_image_features(
        inner, [values], [size[::-1]], image_newline=None, vision_aspect_ratio=limit
    )
    tokens: Tensor = packed[0][values.shape[1] :]
    return tokens


def _product(grid: Grid | None) -> int:
    return 0 if grid is None else grid[0] * grid[1]


FAMILIES: dict[str, Any] = {
    "LlavaForConditionalGeneration": Llava,
    "LlavaNextForConditionalGeneration": LlavaNext,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevision,
    "Qwen2_5_VLForConditionalGeneration": Qwen,
}


def family_of(model: Any) -> Any:
    """The family of a model by the classes that it derives from; None where it is of none."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
