"""A few rows of a decoder layer's attention, from its queries and keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin of positions, (B, n, d) each


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors turned to their positions (RoPE, halves).

    Parameters
    ----------
    x : Tensor
        (B, heads, n, d)
    cos, sin : Tensor
        (B, n, d)
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def attention_rows(queries: Tensor, keys: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """(B, heads, R, n) float32, attention of R query rows over all keys, after the softmax.

    Parameters
    ----------
    queries : Tensor
        (B, heads, R, d)
    keys : Tensor
        (B, groups, n, d); each serves heads / groups queries
    allowed : Tensor
        (B, R, n) bool, the keys that each row sees
    """
    batch, heads, rows, width = queries.shape
    groups = keys.shape[1]
    grouped = queries.float().reshape(batch, groups, heads // groups * rows, width)
    logits = (grouped @ keys.float().transpose(2, 3)) * scale
    logits = logits.view(batch, heads, rows, -1).masked_fill(~allowed[:, None], float("-inf"))
    return logits.softmax(-1)


def seen_by(columns: Tensor, valid: Tensor) -> Tensor:
    """(B, R, n) bool, the tokens that query rows at these columns, (R,), see.

    A row of padding sees itself, so that no row sees nothing.
    """
    every = torch.arange(valid.shape[1], device=valid.device)
    earlier = every <= columns[:, None]
    own = every == columns[:, None]
    return (earlier & valid[:, None]) | own


def attention_of(
    queries: Tensor, keys: Tensor, rope: Rope, columns: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """(B, heads, R, n) float32, attention of the query rows at `columns`, from projections.

    Parameters
    ----------
    queries, keys : Tensor
        (B, R, heads * d) and (B, n, groups * d)
    columns : Tensor
        (R,) int64
    """
    cos, sin = (part.float() for part in rope)
    q, k = (x.float().unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for x in (queries, keys))
    q = rotated(q, cos[:, columns], sin[:, columns])
    return attention_rows(q, rotated(k, cos, sin), seen_by(columns, valid), scale)


def rope_alone(rope: Rope, columns: Tensor, scale: float) -> Tensor:
    """(B, 1, R, n) float32, products of vectors of ones: what the positions alone give."""
    cos, sin = (part.float() for part in rope)
    ones = rotated(torch.ones_like(cos)[:, None], cos, sin)
    return ones[:, :, columns] @ ones.transpose(2, 3) * scale
