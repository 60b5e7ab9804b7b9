"""The attention that Qwen2.5-VL's patches receive, from what its tower computes anyway.

Its layers have one projection for q, k and v, and turn q and k by the patches' places after it. All
images of a call run as one sequence; attention is by image, in most layers by window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_hvp.encoder.capture import reduce_attention
from llava_hvp.encoder.vit import refuse_sharded
from llava_hvp.errors import UnsupportedModelError


@dataclass
class _Seen:
    """One pass of the tower in one thread."""

    heads: int
    layers: Sequence[int]
    rotary: tuple[Tensor, Tensor] | None = None
    ends: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)


# Per thread, so that several generations on one model never see each other's scores.
_SEEN: ContextVar[_Seen | None] = ContextVar("llava_hvp_qwen", default=None)


@dataclass(frozen=True)
class _PlacesHook:
    """A pre-hook on a layer's attention: where patches stand, and where images end."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = _SEEN.get()
        if seen is not None:
            seen.rotary, seen.ends = kwargs.get("position_embeddings"), kwargs.get("cu_seqlens")


@dataclass(frozen=True)
class _QKVHook:
    """A hook on the projection of q, k and v of a layer that is wanted."""

    layer: int

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen = _SEEN.get()
        if seen is None or self.layer not in seen.layers:  # another thread's, another method's
            return
        if seen.rotary is None or seen.ends is None:
            return
        refuse_sharded(f"qkv of layer {self.layer}", output.shape[-1] // 3, args[0].shape[-1])
        with torch.no_grad():
            q, k, _ = output.detach().unflatten(-1, (3, seen.heads, -1)).unbind(-3)
            q, k = (_turned(part, *seen.rotary).flatten(1)[None] for part in (q, k))
            images = seen.ends.diff().tolist()
            received = [
                reduce_attention(a, b, seen.heads, count, cls_attention=False)[0][0]
                for a, b, count in zip(q.split(images, 1), k.split(images, 1), images, strict=True)
            ]
            seen.scores[self.layer] = torch.cat(received)
        seen.rotary = seen.ends = None


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(S, heads, D) states turned by their places, (S, D), in float32; given in their own dtype."""
    first, second = states.float().chunk(2, dim=-1)
    half_turned = torch.cat((-second, first), dim=-1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return (states.float() * cos + half_turned * sin).to(states.dtype)


class QKVHooks:
    """Hooks on some layers, numbered from 1, of a tower's blocks."""

    def __init__(self) -> None:
        self._sitting: dict[int, tuple[nn.Module, list[RemovableHandle]]] = {}

    def cover(self, blocks: Sequence[Any], layers: Sequence[int]) -> None:
        """Hook these layers besides."""
        for layer in layers:
            if layer in self._sitting:
                continue
            attention = blocks[layer - 1].attn
            handles = [
                attention.register_forward_pre_hook(_PlacesHook(), with_kwargs=True),
                attention.qkv.register_forward_hook(_QKVHook(layer)),
            ]
            self._sitting[layer] = attention.qkv, handles

    def on(self, blocks: Sequence[Any]) -> bool:
        """Whether the hooks sit on these blocks still: quantised loading replaces the modules."""
        sitting = tuple(self._sitting.items())  # another thread may be adding some
        return all(module is blocks[layer - 1].attn.qkv for layer, (module, _) in sitting)

    def remove(self) -> None:
        """Take them off."""
        for _, handles in self._sitting.values():
            for handle in handles:
                handle.remove()
        self._sitting = {}


def is_recording() -> bool:
    """Whether a pruned model is just running its tower, in this thread."""
    return _SEEN.get() is not None


@contextmanager
def recording(layers: Sequence[int], heads: int) -> Iterator[dict[int, Tensor]]:
    """Collect the received attention of the one pass inside the block.

    Layer -> (S,) float32 in the tower's own order: the mean over heads and the image's queries.

    Raises UnsupportedModelError where a layer's hooks saw nothing.
    """
    seen = _Seen(heads, layers)
    token = _SEEN.set(seen)
    try:
        yield seen.scores
    finally:
        _SEEN.reset(token)
    missing = set(layers) - seen.scores.keys()
    if missing:
        raise UnsupportedModelError(
            f"the vision tower's attention of layers {sorted(missing)} did not pass through qkv (a "
            "compiled tower?): load the tower without it"
        )
