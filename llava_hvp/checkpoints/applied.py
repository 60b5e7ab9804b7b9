"""A variant put on a model and taken off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from llava_hvp.checkpoints.attentions import all_attentions
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.hosts import host_of


@contextlib.contextmanager
def applied(
    variant: Variant,
    model: Any,
    dtype: torch.dtype,
    *,
    tokenizer: Any = None,
    clip_text: Any = None,
) -> Iterator[Any]:
    """The pruning, or None for stock.

    Parameters
    ----------
    dtype : torch.dtype
        of the images
    tokenizer, clip_text : Any
        for methods that read the prompt
    """
    host = host_of(model)
    if variant.pruning is None or (not variant.prunes and variant.runtime.packs_as_stock):
        # The host's own code alone, for who measures it.
        with host.tiled(model, variant.runtime.tiling):
            yield None
        return

    given = {"tokenizer": tokenizer, **variant.pruning.arguments, "clip_text": clip_text}
    with host.attach(model, **given) as pruning:
        tower = pruning.host_model.encoder
        if variant.pruning.runtime.tower_dtype == "model":
            tower.take_dtype(dtype)  # once a model, so not a part of any phase
        with all_attentions(tower) if variant.all_attentions else contextlib.nullcontext():
            yield pruning
