"""Greedy choices of diverse or covering patches: all tiles at once, a step of a few launches.

Candidates are (B, N): B sets (tiles, or images) of N candidates, each chosen from by itself. A rule
returns `order`, (B, K) indices in the order of choice, no index twice. Nothing here transfers data
from the device, and nothing loops over sets. Ties go to the lower index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_hvp.lazy import torch
from llava_hvp.methods.masks import first_best

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 512  # rows that are multiplied at a time
TINY = 1e-12  # least norm that a row is divided by
SPANNED = 1e-5  # a unit vector with less of its square left lies in the span of the chosen ones


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, (..., D) float32; a row of zeros stays one."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(TINY)


def cosines(rows: Tensor) -> Tensor:
    """Cosine of every two rows, (B, N, D) -> (B, N, N) float32, symmetric to the last bit.

    A product of small matrices need not be; then two rows that are nearest to each other would no
    longer tie, and the choice between them would hang on the size of the batch.
    """
    rows = unit(rows)
    product = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    # Half of it is enough: of all tiles of an image together, this is the dearest step.
    for start in range(0, rows.shape[-2], PIECE):
        piece = rows[..., start : start + PIECE, :]
        product[..., start : start + PIECE, start:] = piece @ rows[..., start:, :].transpose(-1, -2)
    return product.triu() + product.triu(1).transpose(-1, -2)


def mask_of(order: Tensor, candidates: int) -> Tensor:
    """(B, N) bool: the chosen of `candidates`, from an order of choice."""
    mask = torch.zeros(order.shape[0], candidates, dtype=torch.bool, device=order.device)
    return mask.scatter_(-1, order, True)


def farthest_first(similarity: Tensor, k: int) -> Tensor:
    """Max-min: always the candidate that is least like the chosen one it is most like.

    The first is the one least like its most similar other.

    Parameters
    ----------
    similarity : Tensor
        (B, N, N) float, symmetric
    k : int
        how many, at most N
    """
    # Larger than any cosine: nobody is his own neighbour, and who is chosen is not chosen again.
    alone = similarity.diagonal_scatter(
        torch.full_like(similarity[..., 0], -torch.inf), dim1=-2, dim2=-1
    )
    nearest = alone.amax(-1)
    order = [_best(-nearest)]
    nearest = torch.full_like(nearest, -torch.inf)
    while len(order) < k:
        nearest = torch.maximum(nearest, _row(similarity, order[-1]))
        nearest.scatter_(-1, order[-1], torch.inf)
        order.append(_best(-nearest))
    return torch.cat(order, dim=-1)


def determinantal(similarity: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal point process diag(quality) similarity diag(quality).

    Chen et al. 2018 (arXiv 1709.05135), with the quality taken out of the factorisation: `left` is
    what of each unit vector the chosen ones do not span, so that quality**2 * left is the gain.
    Who lies in their span adds nothing but rounding, and waits until nobody else is left; then the
    best by quality are taken.

    Parameters
    ----------
    similarity : Tensor
        (B, N, N) float, cosines
    quality : Tensor
        (B, N) float, not negative
    k : int
        how many, at most N
    """
    left = similarity.diagonal(dim1=-2, dim2=-1).round()  # 1 but for rounding, or 0
    free = torch.ones_like(left, dtype=torch.bool)
    factors = similarity.new_empty(similarity.shape[0], k, similarity.shape[-1])
    order: list[Tensor] = []
    for step in range(k):
        outside = left > SPANNED
        gain = torch.where(outside.any(-1, keepdim=True), quality * quality * left, quality)
        choice = _best(gain.masked_fill(~_first(outside, free), -torch.inf))
        order.append(choice)
        free.scatter_(-1, choice, False)
        past = factors[:, :step]
        spanned = past.gather(-1, choice[:, None].expand(-1, step, 1)).transpose(-1, -2) @ past
        length = left.gather(-1, choice).clamp_min(SPANNED).sqrt()
        factors[:, step] = (_row(similarity, choice) - spanned.squeeze(-2)) / length
        left = (left - factors[:, step].square()).scatter_(-1, choice, 0)
    return torch.cat(order, dim=-1)


def covering(
    rows: Tensor, k: int, weight: Tensor | None = None, last: Tensor | None = None
) -> Tensor:
    """Facility location: always the candidate that covers most of what is not covered yet.

    Row r is covered as far as its largest entry among the chosen, and 0 at first; a candidate's
    gain is what it adds over all rows.

    Parameters
    ----------
    rows : Tensor
        (B, R, N) float, how well each candidate covers each row
    k : int
        how many, at most N
    weight : Tensor | None
        (B, N) float, not negative, by which a candidate's gain is multiplied
    last : Tensor | None
        (B, N) bool, candidates that wait until no other is left
    """
    covered, more = rows.new_zeros(rows.shape[:-1]), torch.empty_like(rows)
    free = torch.ones_like(rows[:, 0], dtype=torch.bool)
    order: list[Tensor] = []
    for _ in range(k):
        gain = torch.sub(rows, covered[..., None], out=more).clamp_min_(0).sum(-2)
        if weight is not None:
            gain = gain * weight
        pool = free if last is None else _first(free & ~last, free)
        choice = _best(gain.masked_fill(~pool, -torch.inf))
        order.append(choice)
        free.scatter_(-1, choice, False)
        covered = torch.maximum(covered, _column(rows, choice))
    return torch.cat(order, dim=-1)


def _first(mask: Tensor, otherwise: Tensor) -> Tensor:
    """`mask`, and `otherwise` in the rows where it is empty."""
    return torch.where(mask.any(-1, keepdim=True), mask, otherwise)


def _best(scores: Tensor) -> Tensor:
    """`first_best` of each row, (B, N) -> (B, 1)."""
    return first_best(scores)[:, None]


def _row(square: Tensor, index: Tensor) -> Tensor:
    """Row `index` (B, 1) of each (N, N): (B, N)."""
    return square.gather(-2, index[..., None].expand(-1, 1, square.shape[-1])).squeeze(-2)


def _column(rows: Tensor, index: Tensor) -> Tensor:
    """Column `index` (B, 1) of each (R, N): (B, R)."""
    return rows.gather(-1, index[:, None].expand(-1, rows.shape[-2], 1)).squeeze(-1)
