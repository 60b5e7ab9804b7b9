"""The images of a call, pruned: features ready for the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.pruning.layout import Size
from llava_hvp.pruning.packing import PackedImages, pack
from llava_hvp.pruning.pruning import Pruning


class Images:
    """The images of one call, cut into tiles and not yet encoded.

    Which of an image's placeholders go does not matter, since positions close up.

    Parameters
    ----------
    pruning : Pruning
        of the model
    pixel_values : Tensor | None
        as the processor gives them
    beside : Mapping[str, Any]
        the call's arguments, of which the family's describe the pixels; `image_sizes` are (height,
        width)
    """

    columns: list[Tensor] | None = None

    def __init__(
        self, pruning: Pruning, pixel_values: Tensor | None, beside: Mapping[str, Any]
    ) -> None:
        self.pruning = pruning
        host: Any = pruning.host_model
        family = host.family
        self.sizes: list[Size | None] = []
        self.stacks: list[Tensor] = []
        self.stock: list[int] = []
        if pixel_values is None or len(pixel_values) == 0:
            return
        if isinstance(pixel_values, (list, tuple)):
            raise UnsupportedModelError(
                "pixel_values as a list: give the tensor that the processor makes with "
                "return_tensors='pt'"
            )
        image_sizes = beside.get("image_sizes")
        if family.newline and image_sizes is None:
            raise UnsupportedModelError(
                "pixel_values without image_sizes: LLaVA-NeXT lays out an image's tiles by its "
                "size; pass on all that the processor gives"
            )
        self.sizes = _sizes(image_sizes if family.newline else None, len(pixel_values))
        tiles, counts = family.tiles(host.model.model, pixel_values, self.sizes, beside)
        self.stacks = list(tiles.split(counts))
        layouts = [
            host.layout(count, size, "stock")
            for count, size in zip(counts, self.sizes, strict=True)
        ]
        self.stock = [place.stock_tokens for place in layouts]
        as_stock = pruning.runtime.patch_merge == "stock"
        self.shrunk = [place.shrunk if as_stock else None for place in layouts]

    def packed(
        self, which: Sequence[int], rows: list[Tensor] | None, dtype: torch.dtype
    ) -> PackedImages:
        """These images, at least one, pruned.

        Parameters
        ----------
        which : Sequence[int]
            numbers of the images
        rows : list[Tensor] | None
            for each of them, the ids of the row that it stands in, without padding; None where no
            prompt is known
        dtype : torch.dtype
            the language model's
        """
        stacks = [self.stacks[n] for n in which]
        return pack(
            self.pruning,
            torch.cat(stacks).to(dtype),
            tuple(len(stack) for stack in stacks),
            [self.sizes[n] for n in which],
            rows,
            laid_out=True,
            shrunk=[self.shrunk[n] for n in which],
        )


def _sizes(image_sizes: Any, images: int) -> list[Size | None]:
    """(width, height) of each image, None where unknown."""
    if image_sizes is None:
        return [None] * images
    pairs = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    return [(int(width), int(height)) for height, width in pairs]
