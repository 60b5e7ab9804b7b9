"""What a cache was filled with, so that code that counts stock's columns can go on with it.

A conversation's next turn, and a decoding loop written by hand, know the long prompt only. The note
on the cache says which of its columns are in there, and of which images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.runtime import PruningConfig

NOTE = "llava_hvp"  # the attribute of a cache


@dataclass(frozen=True)
class CacheNote:
    """The prompt that a cache holds shortened.

    Parameters
    ----------
    long_ids : Tensor
        (B, L) of the prompt as the user knows it
    ids, mask : Tensor
        (B, L') as it was sent; the mask int64
    positions : Tensor
        (B, 1), what to take off a position that goes on from the long prompt
    following : Tensor | None
        (B, 1), the position of what follows the prompt, where its own stay as they were; there is
        nothing to take off then
    config : PruningConfig | None
        what its images were pruned by; None where there are none
    """

    long_ids: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    following: Tensor | None = None
    config: PruningConfig | None = None

    def __post_init__(self) -> None:
        assert self.ids.shape == self.mask.shape

    @property
    def removed(self) -> int:
        """Columns that the long prompt has and the cache has not."""
        return self.long_ids.shape[1] - self.ids.shape[1]


def note_of(cache: Any) -> CacheNote | None:
    """The note on a cache that is filled; None where there is none."""
    note: CacheNote | None = getattr(cache, NOTE, None)
    return note if note is not None and length_of(cache) else None


def check_alike(note: CacheNote | None, now: PruningConfig) -> None:
    """Raise UnsupportedModelError where a cache holds images that were pruned otherwise."""
    before = None if note is None else note.config
    if before is not None and before != now:
        raise UnsupportedModelError(
            f"past_key_values was filled by {before}, and this call is pruned by {now}: begin with "
            "an empty cache, or go on by the same method, as prune=method or inside the same block"
        )


def take_note(cache: Any) -> CacheNote | None:
    """Take the note off a cache that others go on filling; None where there is none."""
    note = note_of(cache)
    if hasattr(cache, "__dict__"):
        vars(cache).pop(NOTE, None)
    return note


def put_note(cache: Any, note: CacheNote) -> None:
    """Leave a note on a cache; what is no object of transformers' own takes none."""
    if hasattr(cache, "__dict__"):
        setattr(cache, NOTE, note)


def new_cache(config: Any) -> Any:
    """An empty cache as stock makes one, for the language model's config."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def length_of(cache: Any) -> int:
    """Columns that a cache holds; raises UnsupportedModelError for what is no Cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedModelError(
            f"past_key_values of type {type(cache).__name__}: give a Cache of transformers, as "
            "DynamicCache()"
        )
    return int(cache.get_seq_length())


def short_mask(note: CacheNote, mask: Tensor, cached: int, new: int) -> Tensor:
    """The mask over what is in the cache and comes anew, of one that counts the long prompt.

    Raises UnsupportedModelError for a mask of neither length.
    """
    short = cached + new
    if mask.ndim != 2 or mask.shape[1] not in (short, short + note.removed):
        raise UnsupportedModelError(
            f"an attention_mask of shape {tuple(mask.shape)} for {new} new tokens: the prompt that "
            f"the cache holds was {note.long_ids.shape[1]} columns, {note.ids.shape[1]} after "
            f"pruning, so the mask has {short + note.removed} columns, or {short}"
        )
    if mask.shape[1] == short:
        return mask
    kept = note.mask.to(mask.device, mask.dtype)
    return torch.cat((kept, mask[:, note.long_ids.shape[1] :]), dim=1)
