"""The encoder as the released methods run it, to compare with: every attention map of every layer.

They ask transformers for `output_attentions`, which forces eager attention in all layers and holds
(layers, heads, 1 + N, 1 + N) numbers a tile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llava_hvp.encoder.capture import AttentionScores, recording
from llava_hvp.encoder.vit import layers_of
from llava_hvp.errors import UnsupportedModelError


@contextlib.contextmanager
def all_attentions(tower: Any) -> Iterator[None]:
    """A pruned tower sees so inside the block; selection and all that follows stay ours."""
    configs = {id(c): c for c in _configs(tower.vit)}.values()
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    tower.run_to_layer = lambda images: _run_to_layer(tower, images)
    try:
        yield
    finally:
        del tower.run_to_layer
        for config, kind in zip(configs, before, strict=True):
            config._attn_implementation = kind


def _run_to_layer(tower: Any, images: Tensor) -> tuple[Tensor, AttentionScores]:
    plan = tower.plan()
    # Keys and queries come by the hooks, as ever.
    projected = dataclasses.replace(plan.needs, received_attention=(), cls_attention=())
    with recording(projected, plan.geometry.heads, plan.geometry.patches) as seen:
        output = tower.vit(images, output_attentions=True, output_hidden_states=True)
    if not output.attentions or output.attentions[0] is None:
        raise UnsupportedModelError("this transformers gives no attentions of its CLIP tower")
    needs = plan.needs
    return output.hidden_states[plan.feature_layer], AttentionScores(
        {
            layer: output.attentions[layer - 1].float().mean((1, 2))[:, 1:]
            for layer in needs.received_attention
        },
        {
            layer: output.attentions[layer - 1][:, :, 0, 1:].float().mean(1)
            for layer in needs.cls_attention
        },
        seen.keys,
        seen.queries,
    )


def _configs(model: torch.nn.Module) -> Iterator[Any]:
    yield model.config
    yield from (layer.self_attn.config for layer in layers_of(model))
