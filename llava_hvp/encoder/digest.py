"""A vision tower by its weights, whatever dtype they are in and whoever loaded them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.encoder.partitioned import gathered
from llava_hvp.errors import UnsupportedModelError

SAMPLE = 1024  # of each weight's values
UNKNOWN = "-"


def tower_digest(model: nn.Module) -> str:
    """Two hashes with a colon between: of matrices, which may be quantised, and of all else.

    They are of signs, which no rounding changes: float32, float16 and bfloat16 of one tower give
    the same, and training leaves traces in them, since some weight is always near zero. What cannot
    be read (quantised, or offloaded) has "-" for a hash.
    """
    signs: dict[bool, list[Tensor] | None] = {True: [], False: []}
    for is_matrix, weight in _weights(model):
        with gathered(weight):
            found = signs[is_matrix]
            if found is None or not weight.is_floating_point() or weight.is_meta:
                signs[is_matrix] = None
                continue
            values = weight.detach().flatten()
            step = -(-len(values) // SAMPLE) if len(values) else 1
            found.append(torch.signbit(values[::step]).to("cpu"))
    return ":".join(_hash(signs[is_matrix]) for is_matrix in (True, False))


def _weights(model: nn.Module) -> Iterator[tuple[bool, Any]]:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                yield isinstance(module, nn.Linear) and name == "weight", weight


def _hash(signs: list[Tensor] | None) -> str:
    if not signs:
        return UNKNOWN
    return hashlib.sha256(torch.cat(signs).numpy().tobytes()).hexdigest()[:16]


def is_digest(text: str) -> bool:
    """Whether a text can be what `tower_digest` gives."""
    parts = text.split(":")
    return len(parts) == 2 and all(part == UNKNOWN or part.isalnum() for part in parts)


def check_same_tower(model: nn.Module, digest: str) -> None:
    """Raise UnsupportedModelError where a tower is not the one of the digest.

    What either cannot tell is not compared.
    """
    found = tower_digest(model)
    for then, now in zip(digest.split(":"), found.split(":"), strict=True):
        if UNKNOWN not in (then, now) and then != now:
            raise UnsupportedModelError(
                f"these options were tuned for another vision tower ({digest}, this one is "
                f"{found}): its layers say nothing of this one's. Tune again, as `llava-hvp tune "
                "--model-path …`, or give the options by flags if you want them all the same"
            )
