"""What differs between the pruned classes of transformers: tiles, and where their tokens stand.

The arithmetic of AnyRes is transformers' own, run on indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.layout import NEWLINE, Layout, Size


class Llava:
    """`LlavaForConditionalGeneration`: an image is one tile, its patches in a row."""

    newline = False

    @staticmethod
    def tiles(
        inner: Any, pixels: Tensor, sizes: Sequence[Size | None]
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

    newline = True

    @staticmethod
    def tiles(
        inner: Any, pixels: Tensor, sizes: Sequence[Size | None]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """All tiles, (T, 3, H, W), and how many each image has; padding tiles left out.

        Raises UnsupportedModelError where the tiles are not those of the sizes.
        """
        counts = tuple(1 + _product(LlavaNext.mosaic(inner, 2, size)) for size in sizes)
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

    @staticmethod
    def layout(inner: Any, grid: Grid, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens of one image: the model's own `pack_image_features` on patches' numbers."""
        rows, columns = grid
        patches = rows * columns
        index = torch.arange(tiles * patches)
        base = index[:patches]
        arrangement = LlavaNext.mosaic(inner, tiles, size)
        if arrangement is None or size is None:
            return Layout(base, newline=merge == "stock")
        if merge == "spatial":
            table = index[patches:].view(*arrangement, rows, columns).transpose(1, 2)
            return Layout(base, table.reshape(arrangement[0] * rows, -1))
        packed, _ = type(inner).pack_image_features(
            inner,
            [index.view(tiles, patches, 1)],
            [size[::-1]],
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([NEWLINE]),
        )
        tokens = packed[0][patches:, 0]
        lines = int((tokens == NEWLINE).sum())
        return Layout(base, tokens.view(lines, -1)[:, :-1] if lines else tokens[None, :0], True)


def _product(grid: Grid | None) -> int:
    return 0 if grid is None else grid[0] * grid[1]


FAMILIES: dict[str, Any] = {
    "LlavaForConditionalGeneration": Llava,
    "LlavaNextForConditionalGeneration": LlavaNext,
}


def family_of(model: Any) -> Any:
    """The family of a model by the classes that it derives from; None where it is of none."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
