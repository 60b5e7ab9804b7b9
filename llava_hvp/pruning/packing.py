"""From images to the visual tokens that the language model gets: encode, select, pack, project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.methods.base import Selection
from llava_hvp.pruning.host import HostModel
from llava_hvp.pruning.layout import NEWLINE, Layout, Size
from llava_hvp.pruning.pruning import Pruning
from llava_hvp.pruning.report import ImageReport


@dataclass(frozen=True)
class PackedImages:
    """Stands in for `images` on the way through the host's own method.

    features : (tokens, D) of each image, ready for the language model
    pruned : whether any image has fewer tokens than stock would send
    """

    features: list[Tensor]
    pruned: bool
    ndim: int = 4  # LLaVA takes the features of 4-D images as they are


def pack(
    pruning: Pruning,
    pixels: Tensor,
    tiles: tuple[int, ...],
    sizes: Sequence[Size | None],
    rows: list[Tensor] | None,
    *,
    laid_out: bool,
) -> PackedImages:
    """Prune the images of one call.

    Parameters
    ----------
    pixels : (T, 3, H, W), the tiles of all images
    tiles : tiles of each image, T in all
    sizes : (width, height) of each image in pixels where known; AnyRes needs it
    rows : token ids of each row of the batch without padding, for methods that read them
    laid_out : whether the host lays tiles out by its config; else each image is one bare tile
    """
    model, method, runtime = pruning.host_model, pruning.method, pruning.runtime
    encoded = pruning.encode(pixels, tiles, rows)
    grid = model.encoder.plan().geometry.grid
    layouts = [
        model.layout(count, size, runtime.patch_merge) if laid_out else _one_tile(grid)
        for count, size in zip(tiles, sizes, strict=True)
    ]
    selections = _by_image(encoded.selection, tiles)
    kept = [
        place.kept(selection.keep.flatten(), runtime.newline)
        for place, selection in zip(layouts, selections, strict=True)
    ]
    view = model.view()
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
    return PackedImages(features, pruned)


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
    model: HostModel, features: Tensor, tiles: tuple[int, ...], kept: list[Tensor], all_kept: bool
) -> list[Tensor]:
    """(tokens, D) of each image: its kept patches projected, its newlines put in."""
    patches = features.shape[1]
    starts = torch.tensor((0, *tiles[:-1])).cumsum(0) * patches
    tokens = torch.cat(
        [torch.where(t == NEWLINE, t, t + start) for t, start in zip(kept, starts, strict=True)]
    )
    is_newline = tokens == NEWLINE
    index = tokens[~is_newline].to(features.device)
    if all_kept:
        # In stock's own shape: a matrix product of other shape may round differently.
        projected = model.project(features).flatten(0, 1)[index]
    else:
        projected = model.project(features.flatten(0, 1)[index])
    if bool(is_newline.any()):
        newline = model.newline()[None].to(projected.device)
        order = torch.where(is_newline, len(index), (~is_newline).cumsum(0) - 1)
        projected = torch.cat((projected, newline))[order.to(projected.device)]
    return list(projected.split([len(t) for t in kept]))
