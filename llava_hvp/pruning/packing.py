"""From images to the visual tokens that the language model gets: encode, select, pack, project."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.methods.base import Mix, Selection, VisionMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.encoding import EncodedTiles
from llava_hvp.pruning.host import HostModel
from llava_hvp.pruning.layout import EXTRA, NEWLINE, Layout, LooseTokens, Size
from llava_hvp.pruning.pruning import Pruning
from llava_hvp.pruning.report import ImageReport
from llava_hvp.pruning.shrunk import Shrunk


@dataclass(frozen=True)
class PackedImages:
    """Stands in for `images` on the way through the host's own method.

    Parameters
    ----------
    features : list[Tensor]
        (tokens, D) of each image, ready for the language model
    pruned : bool
        whether any image has other tokens than stock would send
    reports : list[ImageReport]
        of each image
    tokens : list[Tensor]
        (tokens,) int64 of each image, what each of its features is, as in `pruning.layout`
    """

    features: list[Tensor]
    pruned: bool
    reports: list[ImageReport]
    tokens: list[Tensor]
    ndim: int = 4  # LLaVA takes the features of 4-D images as they are


def pack(
    pruning: Pruning,
    pixels: Tensor,
    tiles: tuple[int, ...],
    sizes: Sequence[Size | None],
    rows: list[Tensor] | None,
    *,
    laid_out: bool,
    shrunk: Sequence[Shrunk | None] = (),
) -> PackedImages:
    """Prune the images of one call.

    Parameters
    ----------
    pixels : Tensor
        (T, 3, H, W), the tiles of all images
    tiles : tuple[int, ...]
        tiles of each image, T in all
    sizes : Sequence[Size | None]
        (width, height) of each image in pixels where known; AnyRes needs it
    rows : list[Tensor] | None
        token ids of each row of the batch without padding, for methods that read them
    laid_out : bool
        whether the host lays tiles out by its config; else each image is one bare tile
    shrunk : Sequence[Shrunk | None]
        of each image whose mosaic the host shrinks, how; empty where it shrinks none
    """
    model, method, runtime = pruning.host_model, pruning.method, pruning.runtime
    encoded = pruning.encode(pixels, tiles, rows, sizes, laid_out, shrunk)
    grid = model.encoder.plan().geometry.grid
    layouts = [
        model.layout(count, size, runtime.patch_merge) if laid_out else _one_tile(grid)
        for count, size in zip(tiles, sizes, strict=True)
    ]
    selections = _by_image(encoded.selection, tiles)
    mosaics = encoded.mosaics or (None,) * len(tiles)
    kept = [
        tokens_of(place, selection, method, runtime.newline)
        if mosaic is None
        else place.kept(torch.cat((selection.keep.flatten(), mosaic.keep[0])), runtime.newline)
        for place, selection, mosaic in zip(layouts, selections, mosaics, strict=True)
    ]
    # Not only where one is left: where the ranks hold a part of it each, all of them gather it.
    has_ends = runtime.newline != "none" and any(place.newline for place in layouts)
    # Before the reports are written: the device projects meanwhile.
    ends = model.newline() if has_ends else None
    features = _project(model, encoded, tiles, kept, ends, [p.shrunk for p in layouts])
    view, name = model.view(), pruning.config.name
    selections = [
        selection
        if mosaic is None or place.shrunk is None
        else place.shrunk.drawn(selection, mosaic)
        for place, selection, mosaic in zip(layouts, selections, mosaics, strict=True)
    ]
    reports = [
        ImageReport(
            name,
            count,
            place.stock_tokens,
            len(tokens),
            _sent(tokens, selection.keep) if mosaic is None else selection.keep,
            grid,
            size,
            selection,
            place.stock(selection.keep.numel()).view_as(selection.keep),
            view,
            encoded.reused,
            mosaic=mosaic,
            pruned_by=str(pruning.config),
        )
        for count, place, tokens, size, selection, mosaic in zip(
            tiles, layouts, kept, sizes, selections, mosaics, strict=True
        )
    ]
    pruned = encoded.selection.mix is not None or any(
        len(tokens) < place.stock_tokens for tokens, place in zip(kept, layouts, strict=True)
    )
    return PackedImages(features, pruned, reports, kept)


def features_by_tile(encoded: EncodedTiles, method: VisionMethod, grid: Grid) -> list[Tensor]:
    """(tokens, D) of each tile by itself, in the order in which a host would get them."""
    tiles = (1,) * len(encoded.features)
    kept = [
        tokens_of(_one_tile(grid), selection, method, "rows")
        for selection in _by_image(encoded.selection, tiles)
    ]
    index = _index_of(encoded, tiles, kept, [None] * len(tiles))
    return list(_all_tokens(encoded)[index].split([len(tokens) for tokens in kept]))


def _one_tile(grid: Grid) -> Layout:
    return Layout(torch.arange(grid[0] * grid[1]))


def _by_image(selection: Selection, tiles: tuple[int, ...]) -> list[Selection]:
    roles = {role: mask.split(tiles) for role, mask in selection.roles.items()}
    mixes = [None] * len(tiles) if selection.mix is None else _mixes(selection.mix, tiles)
    return [
        Selection(keep, {role: masks[i] for role, masks in roles.items()}, mixes[i])
        for i, keep in enumerate(selection.keep.split(tiles))
    ]


def _mixes(mix: Mix, tiles: tuple[int, ...]) -> list[Mix]:
    """The mix of each image."""
    ends = list(itertools.accumulate(tiles))
    parts = [slice(end - count, end) for end, count in zip(ends, tiles, strict=True)]
    return [
        Mix(
            mix.added[part],
            None if mix.extra is None else mix.extra[part],
            None if mix.rank is None else mix.rank[part],
            None if mix.mixed is None else mix.mixed[part],
        )
        for part in parts
    ]


def tokens_of(place: Layout, selection: Selection, method: VisionMethod, newline: str) -> Tensor:
    """(tokens,) int64 that stay of an image, in order, named as in `pruning.layout`."""
    keep = selection.keep
    if selection.mix is None:
        return place.kept(keep.flatten(), newline)
    loose, rank, patches = selection.loose(method.loose), selection.mix.rank, keep.shape[1]
    before, after = [], []
    for tile, (mask, has_extra) in enumerate(zip(loose, selection.extras, strict=True)):
        own = mask.nonzero()[:, 0]
        if rank is not None:
            own = own[rank[tile, own].argsort()]
        extra = torch.full((int(has_extra),), EXTRA - tile)
        before.append(extra if method.extra_first else extra[:0])
        after.append(torch.cat((own + tile * patches, extra[:0] if method.extra_first else extra)))
    return place.kept((keep & ~loose).flatten(), newline, LooseTokens(before, after))


def _sent(tokens: Tensor, keep: Tensor) -> Tensor:
    sent = torch.zeros_like(keep)
    sent.view(-1)[tokens[tokens >= 0]] = True
    return sent


def _all_tokens(encoded: EncodedTiles) -> Tensor:
    """(T * N, D), or (T * N + T, D): every tile's patches, and behind them the extra tokens."""
    patches = encoded.features.flatten(0, 1)
    return patches if encoded.extra is None else torch.cat((patches, encoded.extra))


def _index_of(
    encoded: EncodedTiles,
    tiles: tuple[int, ...],
    kept: list[Tensor],
    shrunk: Sequence[Shrunk | None],
) -> Tensor:
    """(tokens,) int64, for the tokens of all images their rows of `_all_tokens`, or NEWLINE.

    Where mosaics are shrunk, no method has extra tokens, and theirs stand behind all patches.
    """
    total, patches = encoded.features.shape[:2]
    firsts = itertools.accumulate(tiles[:-1], initial=0)
    parts, behind = [], total * patches
    for tokens, first, count, small in zip(kept, firsts, tiles, shrunk, strict=True):
        extra = total * patches + first + EXTRA - tokens
        placed = torch.where(tokens <= EXTRA, extra, tokens + first * patches)
        if small is not None:
            own = count * patches
            placed = torch.where(tokens >= own, tokens - own + behind, placed)
            behind += small.tokens
        parts.append(torch.where(tokens == NEWLINE, tokens, placed))
    return torch.cat(parts)


def _project(
    model: HostModel,
    encoded: EncodedTiles,
    tiles: tuple[int, ...],
    kept: list[Tensor],
    newline: Tensor | None,
    shrunk: Sequence[Shrunk | None],
) -> list[Tensor]:
    """(tokens, D) of each image: its tokens projected, its newlines (D,) put in."""
    tokens = _index_of(encoded, tiles, kept, shrunk)
    is_newline = tokens == NEWLINE
    index = tokens[~is_newline].to(encoded.features.device)
    if encoded.mosaics:
        # Every patch of a mosaic goes into the few tokens that it is shrunk to.
        whole = model.project(encoded.features)
        stacks = zip(whole.split(tiles), shrunk, strict=True)
        small = [each.shrink(stack) for stack, each in stacks if each is not None]
        projected = torch.cat((whole.flatten(0, 1), *small))[index]
    elif encoded.selection.mix is None and bool(encoded.selection.keep.all()):
        # In stock's own shape: a matrix product of other shape may round differently.
        projected = model.project(encoded.features).flatten(0, 1)[index]
    else:
        projected = model.project(_all_tokens(encoded)[index])
    if newline is not None:
        order = torch.where(is_newline, len(index), (~is_newline).cumsum(0) - 1)
        ends = newline[None].to(projected.device)
        projected = torch.cat((projected, ends))[order.to(projected.device)]
    return list(projected.split([len(t) for t in kept]))
