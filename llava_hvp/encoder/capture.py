"""Attention, keys and queries of named layers, from what the encoder computes anyway.

Forward hooks on `q_proj` and `k_proj` see both projections while every layer keeps its own (eager,
sdpa, flash) attention. The attention map is recomputed from them in float32, a chunk at a time,
and reduced at once: no map is ever held, and `output_attentions` is never asked for.
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

from llava_hvp.encoder.vit import refuse_sharded
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import Needs

# Attention entries computed at a time. On the CPU a chunk should stay in the cache (2 MB was the
# fastest of 256 KB to 64 MB for CLIP-L); elsewhere launches cost more than memory.
CHUNK = {"cpu": 2**19}
CHUNK_ELSEWHERE = 2**24


@dataclass(frozen=True)
class AttentionScores:
    """What was seen, by layer, numbered from 1.

    Parameters
    ----------
    received_attention, cls_attention : dict[int, Tensor]
        (T, N) float32
    keys, queries : dict[int, Tensor]
        (T, S, D), k_proj's and q_proj's output in the tower's dtype
    """

    received_attention: dict[int, Tensor]
    cls_attention: dict[int, Tensor]
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)


class _Recording:
    """The q and k of one forward pass in one thread, reduced layer by layer."""

    def __init__(self, needs: Needs, heads: int, patches: int) -> None:
        self.needs, self.heads, self.patches = needs, heads, patches
        self.waiting: dict[int, dict[str, Tensor]] = {}
        self.scores = AttentionScores({}, {})

    def take(self, layer: int, side: str, projected: Tensor) -> None:
        self._hold(layer, side, projected)
        if layer not in self.needs.received_attention and layer not in self.needs.cls_attention:
            return
        pair = self.waiting.setdefault(layer, {})
        pair[side] = projected
        if len(pair) < 2:
            return
        del self.waiting[layer]
        received, cls = reduce_attention(
            pair["q"],
            pair["k"],
            self.heads,
            self.patches,
            cls_attention=layer in self.needs.cls_attention,
        )
        if layer in self.needs.received_attention:
            self.scores.received_attention[layer] = received
        if cls is not None:
            self.scores.cls_attention[layer] = cls

    def _hold(self, layer: int, side: str, projected: Tensor) -> None:
        if side == "k" and layer in self.needs.keys:
            self.scores.keys[layer] = projected.detach()
        if side == "q" and layer in self.needs.queries:
            self.scores.queries[layer] = projected.detach()

    def missing(self) -> set[int]:
        """Layers of which something was wanted and not seen."""
        return {
            layer
            for kind in ("received_attention", "cls_attention", "keys", "queries")
            for layer in getattr(self.needs, kind)
            if layer not in getattr(self.scores, kind)
        }


# Per thread (and task), so that eight generations on one model never see each other's scores.
_RECORDING: ContextVar[_Recording | None] = ContextVar("llava_hvp_recording", default=None)


@dataclass(frozen=True)
class _QKHook:
    """A forward hook; silent unless the thread it runs in is recording."""

    layer: int
    side: str

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        recording = _RECORDING.get()
        if recording is not None:
            name = f"{self.side}_proj of layer {self.layer}"
            refuse_sharded(name, output.shape[-1], args[0].shape[-1])
            recording.take(self.layer, self.side, output)


def only_reads(hook: Any) -> bool:
    """Whether a forward hook is one of ours, which leaves what goes on as it is."""
    return isinstance(hook, _QKHook)


class QKHooks:
    """The hooks that methods need on the layers of one encoder.

    Raises UnsupportedModelError for layers that are known to hold a part of the heads only; of
    those that hide it, the hooks find out.
    """

    def __init__(self, layers: Sequence[Any], needs: Needs) -> None:
        self._sitting: dict[_QKHook, tuple[nn.Module, RemovableHandle]] = {}
        self.cover(layers, needs)

    def cover(self, layers: Sequence[Any], needs: Needs) -> None:
        """Hook what these needs ask for besides; each pass takes what it needs itself."""
        new = {
            hook: _projection(layers, hook)
            for side, kinds in (("q", needs.queries), ("k", needs.keys))
            for layer in sorted({*needs.received_attention, *needs.cls_attention, *kinds})
            if (hook := _QKHook(layer, side)) not in self._sitting
        }
        for hook, module in new.items():
            refuse_sharded(f"{hook.side}_proj of layer {hook.layer}", *_known_widths(module))
        for hook, module in new.items():
            self._sitting[hook] = module, module.register_forward_hook(hook)

    def on(self, layers: Sequence[Any]) -> bool:
        """Whether the hooks sit on these layers still: quantised loading replaces the modules."""
        sitting = tuple(self._sitting.items())  # another thread may be adding some
        return all(module is _projection(layers, hook) for hook, (module, _) in sitting)

    def remove(self) -> None:
        for _, handle in self._sitting.values():
            handle.remove()


def _projection(layers: Sequence[Any], hook: _QKHook) -> nn.Module:
    module: nn.Module = getattr(layers[hook.layer - 1].self_attn, f"{hook.side}_proj")
    return module


def _known_widths(module: Any) -> tuple[int, int]:
    """Widths that a projection gives and reads; (0, 0) where its weights hide them."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    return 0, 0


@contextmanager
def recording(needs: Needs, heads: int, patches: int) -> Iterator[AttentionScores]:
    """Collect the scores of the one forward pass inside the block.

    Raises UnsupportedModelError where a layer's hooks did not fire: no score is ever missing
    silently.
    """
    record = _Recording(needs, heads, patches)
    token = _RECORDING.set(record)
    try:
        yield record.scores
    finally:
        _RECORDING.reset(token)
    missing = record.missing()
    if missing:
        raise UnsupportedModelError(
            f"the vision tower's attention of layers {sorted(missing)} did not pass through q_proj "
            "and k_proj (a fused or compiled attention?): load the tower without it"
        )


@torch.no_grad()
def reduce_attention(
    q: Tensor, k: Tensor, heads: int, patches: int, *, cls_attention: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Received and CLS attention of one layer.

    Parameters
    ----------
    q, k : Tensor
        (T, S, heads * head_dim), the projections without the softmax scale; S = patches, or more
        where CLS leads
    heads, patches : int
        of the encoder
    cls_attention : bool
        whether CLS attention is wanted

    Returns
    -------
    received_attention : (T, patches) float32, mean over heads and all S query rows
    cls_attention : (T, patches) float32, mean over heads of the first row; None where not wanted
    """
    tiles, tokens, _ = q.shape
    chunk = CHUNK.get(q.device.type, CHUNK_ELSEWHERE)
    step = max(1, chunk // (heads * tokens * tokens))
    rows = max(1, chunk // (heads * tokens * step))
    means = [
        _column_means(q[start : start + step], k[start : start + step], heads, rows, cls_attention)
        for start in range(0, tiles, step)
    ]
    received = _joined([mean for mean, _ in means])[:, tokens - patches :]
    firsts = [first for _, first in means if first is not None]
    return received, _joined(firsts)[:, tokens - patches :] if firsts else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _column_means(
    q: Tensor, k: Tensor, heads: int, rows: int, cls_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """(T, S) means over heads and all rows, and over heads of the first; so many rows at a time."""
    tokens, scale = q.shape[1], (q.shape[2] // heads) ** -0.5
    query = (q.float() * scale).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = k.float().unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    if rows >= tokens:  # in few launches: on a GPU they are what this costs
        attention = (query @ key).softmax(-1)
        return attention.mean((1, 2)), attention[:, :, 0].mean(1) if cls_attention else None
    query, key, first = query.contiguous(), key.contiguous(), None
    total = query.new_zeros((len(query), tokens))
    for row in range(0, tokens, rows):
        attention = (query[:, :, row : row + rows] @ key).softmax(-1)
        total += attention.sum((1, 2))
        if cls_attention and row == 0:
            first = attention[:, :, 0].mean(1)
    return total / (heads * tokens), first
