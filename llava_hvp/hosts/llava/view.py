"""What LLaVA shows its vision tower of a picture, for drawing.

The pixels are taken from LLaVA's own `process_images` and only un-normalised: whatever it pads,
squeezes or crops, and whatever the installed transformers makes of a picture, is shown as it is.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from llava.mm_utils import process_images, select_best_resolution
from torch import Tensor

from llava_hvp.errors import LlavaHvpError, PictureError
from llava_hvp.hosts.llava.tiling import TilingConfig, mosaic
from llava_hvp.show.frame import Panel, photo_of

Size = tuple[int, int]
# Of pixels that LLaVA would hold at once; about where PIL, and so LLaVA, refuses a file.
MOST_PIXELS = 2 * 89_478_485


@dataclass(frozen=True)
class LlavaView:
    """How LLaVA shows pictures to its vision tower.

    Parameters
    ----------
    processor : Any
        of the vision tower
    tiling : TilingConfig
        what the model's config says of aspect ratio and pinpoints
    patch_side : int
        pixels along a patch
    """

    processor: Any
    tiling: TilingConfig
    patch_side: int

    @classmethod
    def of(cls, tower: Any, tiling: TilingConfig) -> LlavaView:
        """The view of a model with this loaded vision tower."""
        # A tower that was not loaded from a checkpoint has no processor, and nothing to draw.
        processor = getattr(tower, "image_processor", None)
        return cls(processor, tiling, tower.config.patch_size)

    def panels(self, tiles: int, size: Size | None) -> tuple[Panel, ...]:
        """Where the patches of an image of `tiles` tiles lie, by `tile * N + patch`."""
        rows, columns = self.tiling.grid
        index = torch.arange(tiles * rows * columns).view(tiles, rows, columns)
        if tiles == 1:
            return (Panel("", index[0], self.patch_side),)
        try:
            rest = mosaic(self.tiling, tiles, size)
        except LlavaHvpError:  # packed flat, so that nothing said where the tiles lie
            rest = index[1:].transpose(0, 1).reshape(rows, -1)
        return (
            Panel("base tile", index[0], self.patch_side),
            Panel("mosaic of the sub-images", rest, self.patch_side),
        )

    def describe(self, size: Size) -> str:
        """What becomes of a picture of (width, height), in a line."""
        side = self.tiling.image_side
        start = f"{size[0]} x {size[1]} pixels, "
        if self.tiling.aspect_ratio == "anyres":
            pinpoints = ast.literal_eval(self.tiling.pinpoints)
            width, height = select_best_resolution(size, pinpoints)
            return (
                f"{start}squeezed to {side} x {side} for the base tile; fitted into "
                f"{width} x {height} for the mosaic, padded with black"
            )
        if self.tiling.aspect_ratio == "pad":
            padded = "" if size[0] == size[1] else "padded to a square and "
            return f"{start}{padded}resized to {side} x {side}"
        cropped = "" if size[0] == size[1] else "the middle square of it "
        return f"{start}{cropped}resized to {side} x {side}"

    def pixels(self, image: Any) -> Tensor:
        """(tiles, 3, H, W) of a PIL image, as `process_images` gives them to the model.

        Raises PictureError where LLaVA cannot process the picture, or only with more memory than
        pictures that PIL opens would take.
        """
        if self.processor is None:
            raise PictureError("this model's vision tower has no image processor to see with")
        image = image if image.mode == "RGB" else image.convert("RGB")
        held = self._pixels_held(image.size)
        if held > MOST_PIXELS:
            raise PictureError(
                f"a picture of {image.size[0]} x {image.size[1]} pixels: LLaVA would blow it up to "
                f"{held / 1e6:,.0f} megapixels, and the bound is {MOST_PIXELS / 1e6:.0f}: crop or "
                "shrink it first"
            )
        config = SimpleNamespace(
            image_aspect_ratio=self.tiling.aspect_ratio,
            image_grid_pinpoints=self.tiling.pinpoints,
        )
        try:
            pixels = process_images([image], self.processor, config)[0]
        except Exception as error:  # whatever the installed processor makes of odd sizes
            raise PictureError(
                f"LLaVA's image processor refuses a picture of {image.size[0]} x {image.size[1]} "
                f"pixels: {error}"
            ) from error
        return pixels if pixels.ndim == 4 else pixels[None]

    def _pixels_held(self, size: Size) -> float:
        """The most pixels that LLaVA makes of a picture of (width, height)."""
        short, long = sorted(size)
        if self.tiling.aspect_ratio == "anyres":
            return short * long
        if self.tiling.aspect_ratio == "pad":
            return long * long  # the square of expand2square
        return max(short * long, self.tiling.image_side**2 * long / short)

    def frame(self, image: Any) -> tuple[Panel, ...]:
        """The panels of a PIL image with its photo; raises PictureError as `pixels` does."""
        pixels, processor = self.pixels(image), self.processor
        shown = photo_of(pixels, processor.image_mean, processor.image_std, self.patch_side)
        return tuple(p.with_photo(shown) for p in self.panels(len(pixels), image.size))
