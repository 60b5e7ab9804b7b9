"""What pruning inside a language model cannot stand, refused in a line each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llava_hvp.errors import DecodingError, UnsupportedModelError

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def check_decoder(decoder: Any) -> None:
    """Raise UnsupportedModelError for a decoder whose layers cannot be read or given masks."""
    layers: Any = getattr(decoder, "layers", None)
    attention = getattr(layers[0], "self_attn", None) if layers else None
    parts = ("q_proj", "k_proj")
    if not all(hasattr(attention, part) for part in parts) or hasattr(attention, "q_norm"):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is no decoder of the Llama kind (layers of self_attn with "
            "q_proj and k_proj): prune its vision tower alone"
        )
    implementation = decoder.config._attn_implementation
    if implementation not in ATTENTIONS:
        raise UnsupportedModelError(
            f"attn_implementation={implementation!r} cannot be given masks of its own for each "
            f"layer: load the model with one of {', '.join(ATTENTIONS)}"
        )


def check_window(config: Any, cache: Any, new: int) -> int:
    """Tokens that the first layer has seen; DecodingError where a sliding window ends with `new`.

    Tokens that are dropped inside the language model would move what the window shows.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    window = getattr(config, "sliding_window", None)
    if window and past + new > window:
        raise DecodingError(
            f"a sequence of {past + new} tokens and a sliding window of {window}: load with "
            "sliding_window=None, or prune the vision tower alone"
        )
    return past


def check_cache(cache: Any, *, fresh: bool = False) -> None:
    """Raise DecodingError for a cache that cannot hold, or has lost, what was dropped.

    Parameters
    ----------
    fresh : bool
        whether a prompt with images is to be put into it
    """
    if isinstance(cache, (tuple, list)) and len({layer[0].shape[-2] for layer in cache}) > 1:
        raise DecodingError(
            "this cache holds unlike many tokens a layer and no longer what was dropped: a way of "
            "generating that rebuilds the cache (contrastive search) cannot be pruned inside the "
            "language model"
        )
    if cache is None or not fresh:
        return
    if type(cache).__name__ != "DynamicCache":
        raise DecodingError(
            f"a {type(cache).__name__} holds as many tokens in each layer: generate with the "
            "default cache (no cache_implementation)"
        )
    if cache.get_seq_length():
        raise DecodingError(
            f"a prompt with images on a cache of {cache.get_seq_length()} tokens: start each turn "
            "of a conversation with a new cache"
        )


def check_step(entering: Tensor, cache: Any, known: Any) -> None:
    """Raise DecodingError unless one token comes for each row, on the cache as it was left."""
    if entering.shape[1] != 1:
        raise DecodingError(
            f"{entering.shape[1]} tokens at once after a prompt that was pruned inside the "
            "language model: assisted decoding and further turns on one cache cannot follow"
        )
    rows = len(known.levels[0].lengths)
    if len(entering) != rows:
        raise DecodingError(f"{len(entering)} rows on the cache of {rows}: start a new one")
    new = cache.get_seq_length() - known.length
    for level in known.levels:
        length = cache.get_seq_length(level.layer)
        if length != level.length + new or new < 0:
            raise DecodingError(
                f"layer {level.layer} holds {length} tokens where {level.length + new} were left: "
                "a cache pruned inside the language model cannot be cut"
            )
