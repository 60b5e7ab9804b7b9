"""Tensor steps that the methods share. No model, no host: scores in, masks out.

Scores are (T, N) float, masks (T, N) bool; T tiles, N = rows * columns patches in raster order.
Nothing here transfers data from the device. Ties go to the lower token index everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llava_hvp.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


Grid = tuple[int, int]


def top_k(scores: Tensor, k: int | Tensor, among: Tensor | None = None) -> Tensor:
    """Mask of the `k` best of each row, fewer where `among` offers fewer.

    Parameters
    ----------
    scores : Tensor
        (T, N) finite float
    k : int | Tensor
        how many; an int or a (T, 1) integer tensor (a negative number keeps none)
    among : Tensor | None
        (T, N) bool, the candidates; all by default
    """
    if among is not None:
        scores = scores.masked_fill(~among, float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if isinstance(k, int):
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : max(k, 0)], True)
        return mask if among is None else mask & among
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    mask = rank < k
    return mask if among is None else mask & among


def top_k_per_block(
    scores: Tensor, grid: Grid, block: Grid, k: int, among: Tensor | None = None
) -> Tensor:
    """Mask of the `k` best patches in each block of the grid.

    Blocks are `block` = (rows, columns) patches, laid from the top left; those at the right and
    bottom edge are smaller where the grid is not a multiple. A block with fewer candidates than
    `k` keeps all of them.
    """
    rows, columns = grid
    block = min(block[0], rows), min(block[1], columns)
    blocks = _into_blocks(scores, grid, block, float("-inf"))
    # What fills up the edge scores least of all, and is cut off again.
    candidates = None if among is None else _into_blocks(among, grid, block, False).flatten(0, 1)
    mask = top_k(blocks.flatten(0, 1), k, candidates).view_as(blocks)
    tall, wide = -(-rows // block[0]), -(-columns // block[1])
    mask = mask.view(-1, tall, wide, *block).transpose(2, 3)
    mask = mask.reshape(-1, tall * block[0], wide * block[1])
    return mask[:, :rows, :columns].flatten(1)


def _into_blocks(values: Tensor, grid: Grid, block: Grid, fill: float | bool) -> Tensor:
    """(T, N) -> (T, blocks, patches a block), raster order inside a block, edges filled up."""
    rows, columns = grid
    tall, wide = -(-rows // block[0]), -(-columns // block[1])
    values = values.view(-1, rows, columns)
    padding = (0, wide * block[1] - columns, 0, tall * block[0] - rows)
    if any(padding):
        values = functional.pad(values, padding, value=fill)
    values = values.view(-1, tall, block[0], wide, block[1]).transpose(2, 3)
    return values.reshape(-1, tall * wide, block[0] * block[1])


def neighbours(mask: Tensor, grid: Grid, offsets: Iterable[Grid]) -> Tensor:
    """Mask of the patches at (row, column) `offsets` from those in `mask`, none across an edge."""
    rows, columns = grid
    source = mask.view(-1, rows, columns)
    reached = torch.zeros_like(source)
    for down, right in offsets:
        if abs(down) >= rows or abs(right) >= columns:
            continue
        onto = reached[
            :, max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)
        ]
        onto |= source[
            :, max(-down, 0) : rows + min(-down, 0), max(-right, 0) : columns + min(-right, 0)
        ]
    return reached.flatten(1)


def flat_neighbours(mask: Tensor, grid: Grid, offsets: Iterable[Grid]) -> Tensor:
    """As `neighbours`, by flat index: wraps across rows, and clamps to the first and last patch."""
    patches = mask.shape[-1]
    reached = torch.zeros_like(mask, dtype=torch.int32)
    for down, right in offsets:
        target = torch.arange(patches, device=mask.device) + down * grid[1] + right
        reached.index_add_(1, target.clamp_(0, patches - 1), mask.to(torch.int32))
    return reached > 0


def ranks(scores: Tensor) -> Tensor:
    """The place of each patch in its row's order, 0 for the best; of equals the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def first_best(scores: Tensor) -> Tensor:
    """The index of each row's best entry, (..., N) -> (...), the first of equals on every device.

    `argmax` promises that in some releases only. A row with nan, which is refused once somebody
    looks, gives an index in range too.
    """
    last = scores.shape[-1] - 1
    places = torch.arange(last + 1, device=scores.device)
    return places.where(scores == scores.amax(-1, keepdim=True), last).amin(-1)


def indices(mask: Tensor, count: int) -> Tensor:
    """(T, count) indices of the first patches of a mask in raster order, then of the others."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[:, :count]
