"""The masks that layers get whose tokens became fewer."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_hvp.decoder.rows import seen_by


def causal_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, n, n) to add to the logits of attention."""
    allowed = seen_by(torch.arange(valid.shape[1], device=valid.device), valid)
    return _additive(allowed[:, None], dtype)


def step_mask(valid: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, n + steps) to add, for one new token that sees all that were generated."""
    return _additive(grown(valid, steps)[:, None, None], dtype)


def grown(valid: Tensor, steps: int) -> Tensor:
    """(B, n + steps) bool: so many generated tokens behind the prompt's."""
    return torch.nn.functional.pad(valid, (0, steps), value=True)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)
