"""Weights of which every rank holds a part: gathered for a moment, or never taken apart.

ZeRO-3 leaves a parameter empty between its module's runs. Each gathering is a collective: all ranks
come to it, the same number of times, or they wait for each other for ever.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# What ZeRO-3 and FSDP (flat, then with original parameters) put on a parameter.
MARKS = frozenset({"ds_id", "_is_flat_param", "_fsdp_flattened"})
_ABSENT = ("NOT_AVAILABLE", "INFLIGHT")


def is_partitioned(weight: Tensor) -> bool:
    """Whether this rank holds a part of the weight only; DTensors count."""
    return not MARKS.isdisjoint(vars(weight)) or hasattr(type(weight), "placements")


@contextmanager
def gathered(*weights: Any) -> Iterator[None]:
    """Inside, weights that ZeRO-3 has partitioned are whole; for reading."""
    # In the forward of its engine DeepSpeed has gathered what was touched, and frees it by itself.
    empty = [w for w in weights if getattr(getattr(w, "ds_status", None), "name", "") in _ABSENT]
    if not empty:
        yield
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(empty):
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every rank the whole model, also where ZeRO-3 is asked for.

    transformers partitions whatever is loaded while a DeepSpeed config of stage 3 is alive.
    """
    integration = importlib.import_module("transformers.integrations.deepspeed")
    config = (getattr(integration, "_hf_deepspeed_config_weak_ref", None) or (lambda: None))()
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)
