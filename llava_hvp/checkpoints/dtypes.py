"""What models can be computed in, by the names that flags and arguments take."""

from __future__ import annotations

from llava_hvp.lazy import torch

DTYPES = ("float16", "bfloat16", "float32")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name, one of DTYPES."""
    found: torch.dtype = getattr(torch, name)
    return found
