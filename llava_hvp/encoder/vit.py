"""Reading and running a CLIP vision transformer up to one layer, on any transformers release."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.select import Grid


@dataclass(frozen=True)
class Geometry:
    """grid : (rows, columns) of patches; depth : layers; heads : of each layer."""

    grid: Grid
    depth: int
    heads: int

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def normalised(self, layer: int) -> int:
        """An index into the hidden states (0 the embeddings, -1 the last) as a layer from 1."""
        return layer if layer >= 0 else self.depth + 1 + layer


def transformer(model: nn.Module) -> Any:
    """The transformer itself: until transformers 5, `CLIPVisionModel` had it one level down."""
    return getattr(model, "vision_model", model)


def layers_of(model: nn.Module) -> Sequence[Any]:
    """The encoder's layers, in order; layer 1 is the first."""
    return transformer(model).encoder.layers


def read_geometry(model: nn.Module) -> Geometry:
    """The geometry of a ViT; raises UnsupportedModelError for what is not one that we can read."""
    vit = transformer(model)
    missing = [part for part in ("embeddings", "pre_layrnorm", "encoder") if not hasattr(vit, part)]
    layers = getattr(getattr(vit, "encoder", None), "layers", ())
    projections = [
        getattr(getattr(x, "self_attn", None), p, None)
        for x in layers
        for p in ("q_proj", "k_proj")
    ]
    if missing or not layers or None in projections:
        raise UnsupportedModelError(
            f"the vision tower holds a {type(model).__name__}, which is not a CLIP vision "
            "transformer with q_proj and k_proj in every layer: pruning needs one of LLaVA's own"
        )
    config: Any = model.config
    side = config.image_size // config.patch_size
    return Geometry((side, side), len(layers), config.num_attention_heads)


@torch.no_grad()
def hidden_states(model: nn.Module, images: Tensor, layer: int) -> Tensor:
    """(T, 1 + N, D) output of `layer`, the same bits as `hidden_states[layer]` of a full pass.

    Layers past it are not run. `images` is (T, 3, H, W) on the model's device, in its dtype.
    """
    vit = transformer(model)
    hidden = vit.pre_layrnorm(vit.embeddings(images))
    for block in vit.encoder.layers[:layer]:
        output = block(hidden, **_no_masks(type(block).forward))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@functools.cache
def _no_masks(forward: Callable[..., Any]) -> dict[str, None]:
    """The masks that a layer wants to be told of; a vision tower has none."""
    taken = inspect.signature(forward).parameters
    return {name: None for name in ("attention_mask", "causal_attention_mask") if name in taken}
