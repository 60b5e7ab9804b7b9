"""bitsandbytes as on a CPU with bfloat16 units and as on one without, whatever this one has.

Where there are units, the first `forward` of a 4-bit layer repacks its weights for them and rounds
its scales to bfloat16; asking for its state packs them back, by scales that are rounded once more.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional


@contextlib.contextmanager
def bfloat16_units(there: bool) -> Iterator[None]:
    """Layers that are made in the block take the CPU for one with units, or without.

    The kernel for repacked weights is bitsandbytes' own where this CPU can run it, else ours.
    """
    import bitsandbytes

    modules, functions = bitsandbytes.nn.modules, bitsandbytes.functional
    with pytest.MonkeyPatch.context() as patch:
        emulated = there and not functions.has_avx512bf16()
        patch.setattr(modules, "has_avx512bf16", lambda: there)
        if emulated:
            patch.setattr(functions, "gemv_4bit", multiply_repacked)
        yield


def multiply_repacked(rows: Any, packed: Any, out: Any = None, *, state: Any) -> torch.Tensor:
    """`rows` (…, K) by repacked 4-bit weights (N, K), in bfloat16, slowly."""
    from bitsandbytes import functional as functions

    assert out is None
    plain = copy.copy(state)
    plain.original_nested = False  # the scales stay as they are, in the other order
    codes, plain = functions._convert_weight_packed_for_cpu_inverse(packed, plain)
    plain.absmax = state.absmax.T.reshape(-1).float()
    weight = functions.dequantize_4bit(codes, plain)
    return functional.linear(rows.bfloat16(), weight.bfloat16()).to(rows.dtype)
