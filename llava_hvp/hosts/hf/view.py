"""What a processor of transformers shows the vision tower of a picture, for drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import LlavaHvpError, PictureError
from llava_hvp.show.frame import Panel, photo_of

Size = tuple[int, int]


@dataclass(frozen=True)
class HFView:
    """How a model sees pictures: by the image processor of its own checkpoint.

    Parameters
    ----------
    host : Any
        the HFModel
    """

    host: Any

    def panels(self, tiles: int, size: Size | None) -> tuple[Panel, ...]:
        """Where the patches of an image of `tiles` tiles lie, by `tile * N + patch`."""
        rows, columns = self.host.grid
        index = torch.arange(tiles * rows * columns).view(tiles, rows, columns)
        if tiles == 1:
            return (Panel("", index[0], self._patch_side),)
        table = self.host.layout(tiles, size, "spatial").mosaic
        return (
            Panel("base tile", index[0], self._patch_side),
            Panel("mosaic of the sub-images", table, self._patch_side),
        )

    def describe(self, size: Size) -> str:
        """What becomes of a picture of (width, height), in a line."""
        side = self.host.encoder.vit.config.image_size
        start = f"{size[0]} x {size[1]} pixels, "
        if self.host.family.newline:
            down, across = self.host.mosaic(2, size)
            return (
                f"{start}squeezed to {side} x {side} for the base tile; fitted into "
                f"{across * side} x {down * side} for the mosaic, padded with black"
            )
        return f"{start}made {side} x {side} by the checkpoint's image processor"

    def pixels(self, image: Any) -> Tensor:
        """(tiles, 3, H, W) of a PIL image; raises PictureError where it cannot be processed."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        try:
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
        except LlavaHvpError:
            raise
        except Exception as error:  # whatever the processor makes of odd sizes
            raise PictureError(
                f"the image processor refuses a picture of {image.size[0]} x {image.size[1]} "
                f"pixels: {error}"
            ) from error
        tiles: Tensor = pixels[0] if pixels.ndim == 5 else pixels
        return tiles

    def frame(self, image: Any) -> tuple[Panel, ...]:
        """The panels of a PIL image with its photo; raises PictureError as `pixels` does."""
        pixels, processor = self.pixels(image), self._processor
        shown = photo_of(pixels, processor.image_mean, processor.image_std, self._patch_side)
        return tuple(p.with_photo(shown) for p in self.panels(len(pixels), image.size))

    @property
    def _patch_side(self) -> int:
        side: int = self.host.encoder.vit.config.patch_size
        return side

    @property
    def _processor(self) -> Any:
        """The image processor of the processor given to `prune`, or of the checkpoint."""
        given = getattr(self.host.processor, "image_processor", None)
        if given is not None:
            return given
        from transformers import AutoImageProcessor

        checkpoint = self.host.model.config._name_or_path
        try:
            return AutoImageProcessor.from_pretrained(checkpoint)
        except Exception as error:  # hub, file format, missing library: there is none
            raise PictureError(
                f"no image processor to see with in {checkpoint!r} ({error}): prune with "
                "prune(model, method, tokenizer=processor)"
            ) from error
