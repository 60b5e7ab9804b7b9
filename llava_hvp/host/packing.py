"""From images to the visual tokens that the language model gets: encode, select, pack, project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.host.layout import NEWLINE, Arrangement, Layout, layout, sizes_of
from llava_hvp.host.tower import PrunedCLIPVisionTower
from llava_hvp.host.view import LlavaView
from llava_hvp.methods.base import Selection
from llava_hvp.report import ImageReport


@dataclass(frozen=True)
class Packed:
    """Stands in for `images` on the way through the stock method.

    features : (tokens, D) of each image, ready for the language model
    pruned : whether any image has fewer tokens than stock would send
    """

    features: list[Tensor]
    pruned: bool
    ndim: int = 4  # stock takes the features of 4-D images as they are


def pack(
    model: Any, images: Any, image_sizes: Sequence[Any] | None, prompts: list[Tensor] | None
) -> Packed:
    """Prune the images of one call.

    Parameters
    ----------
    model : a LLaVA model with a pruned tower
    images : (B, 3, H, W), (B, tiles, 3, H, W), or a list of (3, H, W) and (tiles, 3, H, W)
    image_sizes : (width, height) of each image; AnyRes needs it
    prompts : token ids of each row of the batch without padding, for methods that read them
    """
    tower = model.get_vision_tower()
    if not isinstance(tower, PrunedCLIPVisionTower):
        raise UnsupportedModelError(
            f"this model was set up for pruning, but its vision tower is a {type(tower).__name__} "
            "now: load the model again, or unprune(model) first"
        )
    pruning, method = model.llava_hvp, tower.prune_method
    tiled = isinstance(images, list) or images.ndim == 5
    stacks = [x[None] if x.ndim == 3 else x for x in images] if tiled else list(images[:, None])
    tiles = tuple(len(stack) for stack in stacks)
    pixels = torch.cat(stacks) if tiled else images
    encoded = pruning.encode(pixels, tiles, prompts)

    sizes = sizes_of(image_sizes, len(tiles))
    grid = tower.reading().geometry.grid
    arrangement = Arrangement.of(model.config, grid, tower.config.image_size)
    layouts = [
        layout(arrangement, count, size, method.patch_merge) if tiled else _one_tile(grid)
        for count, size in zip(tiles, sizes, strict=True)
    ]
    selections = _by_image(encoded.selection, tiles)
    kept = [
        place.kept(selection.keep.flatten(), method.newline)
        for place, selection in zip(layouts, selections, strict=True)
    ]
    view = LlavaView.of(tower, arrangement)
    pruning.record(
        ImageReport(
            method.name,
            count,
            place.stock_tokens,
            len(tokens),
            _sent(tokens, selection.keep),
            grid,
            size,
            selection,
            place.stock(selection.keep.numel()).view_as(selection.keep),
            view,
            encoded.reused,
        )
        for count, place, tokens, size, selection in zip(
            tiles, layouts, kept, sizes, selections, strict=True
        )
    )
    features = _project(model, encoded.features, tiles, kept, bool(encoded.selection.keep.all()))
    pruned = any(len(t) < place.stock_tokens for t, place in zip(kept, layouts, strict=True))
    return Packed(features, pruned)


def _one_tile(grid: tuple[int, int]) -> Layout:
    return Layout(torch.arange(grid[0] * grid[1]))


def _by_image(selection: Selection, tiles: tuple[int, ...]) -> list[Selection]:
    roles = {role: mask.split(tiles) for role, mask in selection.roles.items()}
    return [
        Selection(keep, {role: masks[i] for role, masks in roles.items()})
        for i, keep in enumerate(selection.keep.split(tiles))
    ]


def _sent(tokens: Tensor, keep: Tensor) -> Tensor:
    sent = torch.zeros_like(keep)
    sent.view(-1)[tokens[tokens != NEWLINE]] = True
    return sent


def _project(
    model: Any, features: Tensor, tiles: tuple[int, ...], kept: list[Tensor], all_kept: bool
) -> list[Tensor]:
    """(tokens, D) of each image: its kept patches projected, its newlines put in."""
    patches = features.shape[1]
    starts = torch.tensor((0, *tiles[:-1])).cumsum(0) * patches
    tokens = torch.cat(
        [torch.where(t == NEWLINE, t, t + start) for t, start in zip(kept, starts, strict=True)]
    )
    is_newline = tokens == NEWLINE
    index = tokens[~is_newline].to(features.device)
    projector = model.get_model().mm_projector
    if all_kept:
        # In stock's own shape: a matrix product of other shape may round differently.
        projected = projector(features).flatten(0, 1)[index]
    else:
        projected = projector(features.flatten(0, 1)[index])
    if bool(is_newline.any()):
        newline = model.get_model().image_newline[None].to(projected.device)
        order = torch.where(is_newline, len(index), (~is_newline).cumsum(0) - 1)
        projected = torch.cat((projected, newline))[order.to(projected.device)]
    return list(projected.split([len(t) for t in kept]))
