"""The two methods of `LlavaMetaForCausalLM` that pruning overrides, on one instance.

`prepare_inputs_labels_for_multimodal` encodes, selects and packs, then calls the stock method with
a stand-in for `images`, for which `encode_images` hands the packed features back: stock indexes
them as it would its own, ragged or not. No line of the stock method is repeated, and nothing is
stored on the model between the two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX
from torch import Tensor

from llava_hvp.hosts.llava.grid import check_tiles
from llava_hvp.hosts.llava.prompt import images_of_rows
from llava_hvp.hosts.llava.tiling import sizes_of
from llava_hvp.pruning import expected
from llava_hvp.pruning.packing import PackedImages, pack


def encode_images(self: Any, images: Any) -> list[Tensor]:
    """As stock, but a (kept, D) tensor for each image; for the stand-in, its features."""
    if isinstance(images, PackedImages):
        return images.features
    packed = _pack(self, images, None, None)
    if self.llava_hvp.inside is None:  # else no prompt says what becomes of them
        self.llava_hvp.record(packed.reports)
    return packed.features


def prepare_inputs_labels_for_multimodal(
    self: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Any,
    image_sizes: Sequence[Any] | None = None,
) -> tuple[Any, ...]:
    """As stock, with pruned images; a ragged batch gets the mask and the padding that it needs.

    Where nothing was pruned, what stock gives is given, bit for bit.
    """

    def stock(images: Any, mask: Tensor | None, labels: Tensor | None) -> tuple[Any, ...]:
        return type(self).prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, mask, past_key_values, labels, images, image_sizes
        )

    if images is None or input_ids.shape[1] == 1 or self.get_vision_tower() is None:
        return stock(images, attention_mask, labels)
    prompts = _without_padding(input_ids, attention_mask)
    packed = _pack(self, images, image_sizes, prompts)
    # To count images waits for the device: only for a method inside.
    counted = self.llava_hvp.inside is not None
    rows = images_of_rows(prompts, len(packed.features)) if counted else ()
    drops = expected.drops(self.llava_hvp, packed, rows)
    if not drops:
        expected.record_all(self.llava_hvp, packed)
        if not packed.pruned or labels is not None or len(prompts) == 1:
            return stock(packed, attention_mask, labels)
    elif labels is not None:
        raise expected.no_labels(self.llava_hvp)
    # Stock returns no mask where it got none, and pads on the right: generation from a ragged
    # batch would attend to the padding and go on after it.
    mask = (
        torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    )
    marks = torch.zeros_like(input_ids) if drops else None
    nothing, positions, mask, cache, embeds, marks = stock(packed, mask, marks)
    is_full = bool(mask.all())
    if not is_full:
        source = _left_padded(mask.bool())
        embeds = embeds.gather(1, source[..., None].expand_as(embeds))
        positions = None if positions is None else positions.gather(1, source)
        mask = mask.gather(1, source)
        marks = None if marks is None else marks.gather(1, source)
    if marks is not None:
        valid = mask.bool()
        expected.expect(
            self.llava_hvp, packed, rows, embeds, (marks == IGNORE_INDEX) & valid, valid
        )
    is_none = is_full and attention_mask is None
    return nothing, positions, None if is_none else mask, cache, embeds, None


def _pack(
    model: Any, images: Any, image_sizes: Sequence[Any] | None, rows: list[Tensor] | None
) -> PackedImages:
    """Prune the images of one call.

    Parameters
    ----------
    images : Any
        (B, 3, H, W), (B, tiles, 3, H, W), or a list of (3, H, W) and (tiles, 3, H, W)
    image_sizes : Sequence[Any] | None
        (width, height) of each image; AnyRes needs it
    rows : list[Tensor] | None
        token ids of each row of the batch without padding
    """
    tiled = isinstance(images, list) or images.ndim == 5
    stacks = [x[None] if x.ndim == 3 else x for x in images] if tiled else list(images[:, None])
    tiles = tuple(len(stack) for stack in stacks)
    if rows is not None:  # else tiles that stand alone
        check_tiles(tiles, model.llava_hvp.runtime.tiling)
    pixels = torch.cat(stacks) if tiled else images
    sizes = sizes_of(image_sizes, len(tiles))
    return pack(model.llava_hvp, pixels, tiles, sizes, rows, laid_out=tiled)


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The rows as stock sees them."""
    if attention_mask is None:
        return list(input_ids)
    return [ids[mask] for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]


def _left_padded(mask: Tensor) -> Tensor:
    """(B, L) int64, for each column of a row the column to take so that padding comes first."""
    length = mask.shape[1]
    padding = length - mask.sum(1, keepdim=True)
    first = mask.int().argmax(1, keepdim=True)
    return (torch.arange(length, device=mask.device) - padding + first) % length
