"""Reading and running a vision transformer up to one layer, on any transformers release.

CLIP's, and SigLIP's, which has neither a CLS token nor a norm before the first layer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import Needs
from llava_hvp.methods.masks import Grid


@dataclass(frozen=True)
class Geometry:
    """The shape of a vision transformer.

    Parameters
    ----------
    grid : Grid
        (rows, columns) of patches
    depth : int
        number of layers
    heads : int
        attention heads of each layer
    has_cls : bool
        whether a CLS token leads the patches
    """

    grid: Grid
    depth: int
    heads: int
    has_cls: bool = True

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
    missing = [part for part in ("embeddings", "encoder") if not hasattr(vit, part)]
    has_cls = not missing and hasattr(vit.embeddings, "class_embedding")
    missing += ["pre_layrnorm"] if has_cls and not hasattr(vit, "pre_layrnorm") else []
    layers = getattr(getattr(vit, "encoder", None), "layers", ())
    projections = [
        getattr(getattr(x, "self_attn", None), p, None)
        for x in layers
        for p in ("q_proj", "k_proj")
    ]
    if missing or not layers or None in projections:
        raise UnsupportedModelError(
            f"the vision tower holds a {type(model).__name__}, which is not a CLIP or SigLIP "
            "vision transformer with q_proj and k_proj in every layer: pruning needs one of "
            "LLaVA's own"
        )
    return dataclasses.replace(geometry_of(model.config), depth=len(layers), has_cls=has_cls)


def geometry_of(config: Any) -> Geometry:
    """The geometry that a `CLIPVisionConfig` or `SiglipVisionConfig` gives."""
    side = config.image_size // config.patch_size
    return Geometry((side, side), config.num_hidden_layers, config.num_attention_heads)


def refuse_sharded(name: str, width: int, hidden: int) -> None:
    """Raise UnsupportedModelError unless a projection is as wide as the hidden states it reads.

    A tower that tensor parallelism has split gives each process a part of the heads only.
    """
    if width != hidden:
        raise UnsupportedModelError(
            f"{name} of the vision tower is {width} wide and not {hidden} as its hidden states, so "
            "that a part of the heads is missing: leave the tower whole where the model is "
            "sharded, as deepspeed.init_inference(model, tensor_parallel=..., injection_policy="
            '{LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj")})'
        )


def hidden_states(model: nn.Module, images: Tensor, layer: int, *, fused: bool = False) -> Tensor:
    """(T, S, D) output of `layer`, S = N, or 1 + N where CLS leads; layers past it are not run.

    The same bits as `hidden_states[layer]` of a full pass, unless fused attention replaces eager.

    Parameters
    ----------
    images : Tensor
        (T, 3, H, W) on the model's device, in its dtype
    fused : bool
        use torch's fused attention in layers whose own is eager
    """
    vit = transformer(model)
    hidden = vit.embeddings(images)
    if hasattr(vit, "pre_layrnorm"):
        hidden = vit.pre_layrnorm(hidden)
    for block in vit.encoder.layers[:layer]:
        if fused and _is_eager(block):
            hidden = _with_fused_attention(block, hidden)
            continue
        output = block(hidden, **_no_masks(type(block).forward))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def project_next(model: nn.Module, hidden: Tensor, layer: int, needs: Needs) -> None:
    """Keys and queries of layer `layer` + 1 where a method reads them, for the hooks to see.

    They are made of the output of `layer`; the layer itself is not run.

    Parameters
    ----------
    hidden : Tensor
        (T, S, D), the output of `layer`
    """
    sides = [
        side for side, named in (("q", needs.queries), ("k", needs.keys)) if layer + 1 in named
    ]
    if not sides:
        return
    block = layers_of(model)[layer]
    place = block.layer_norm1.weight.device
    if place.type != "meta":  # of an offloaded layer, whose own hooks move what comes in
        hidden = hidden.to(place)
    normed = block.layer_norm1(hidden)
    for side in sides:
        getattr(block.self_attn, f"{side}_proj")(normed)


def attention_of(model: nn.Module, *, fused: bool = False) -> str:
    """Which attention the layers run, as "eager" or "sdpa"; `fused` as in `hidden_states`."""
    kinds = {"sdpa" if fused and _is_eager(x) else _attention_of(x) for x in layers_of(model)}
    return ", ".join(sorted(kinds))


def _attention_of(block: Any) -> str:
    config = getattr(block.self_attn, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


def _is_eager(block: Any) -> bool:
    """Whether a layer of CLIP or SigLIP has eager attention, and nothing watches or moves it."""
    attention = block.self_attn
    # accelerate's hooks carry the hidden states from device to device.
    watched = [m for m in (block, attention) if m._forward_hooks or m._forward_pre_hooks]
    moved = [m for m in (block, attention) if hasattr(m, "_hf_hook")]
    return (
        _attention_of(block) == "eager"
        and not watched
        and not moved
        and hasattr(attention, "out_proj")
    )


def _with_fused_attention(block: Any, hidden: Tensor) -> Tensor:
    """What a layer of CLIP's or SigLIP's does, with one kernel for its attention."""
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    projected = [getattr(attention, name)(normed) for name in ("q_proj", "k_proj", "v_proj")]
    for name, output in zip(("q_proj", "k_proj", "v_proj"), projected, strict=True):
        refuse_sharded(name, output.shape[-1], hidden.shape[-1])
    query, key, value = (
        output.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for output in projected
    )
    mixed = functional.scaled_dot_product_attention(query, key, value)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.layer_norm2(hidden))


@functools.cache
def _no_masks(forward: Callable[..., Any]) -> dict[str, None]:
    """The masks that a layer wants to be told of; a vision tower has none."""
    taken = inspect.signature(forward).parameters
    return {name: None for name in ("attention_mask", "causal_attention_mask") if name in taken}
