"""A prompt with its images put in, shortened: what the language model gets instead of ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.cache import CacheNote, short_mask
from llava_hvp.hosts.hf.sequence import Shortened, images_of_rows, shorten
from llava_hvp.pruning.packing import PackedImages
from llava_hvp.pruning.pruning import Pruning


@dataclass(frozen=True)
class ShortPrompt:
    """A shortened batch, embedded.

    Parameters
    ----------
    shortened : Shortened
        where each column came from; `visual` says which hold visual tokens
    ids : Tensor
        (B, L'), placeholders of the tokens that stay included
    mask : Tensor
        (B, L') int64
    embeds : Tensor
        (B, L', D)
    packed : PackedImages | None
        the images that were put in; None where there are none
    images_of_rows : tuple[tuple[int, ...], ...]
        of each row, their numbers
    """

    shortened: Shortened
    ids: Tensor
    mask: Tensor
    embeds: Tensor
    packed: PackedImages | None
    images_of_rows: tuple[tuple[int, ...], ...]

    @property
    def removed(self) -> bool:
        """Whether any column went or came."""
        return self.shortened.removed


@dataclass(frozen=True)
class Before:
    """What stands before a prompt: columns that a cache holds already.

    Parameters
    ----------
    long_ids : Tensor
        (B, C) as the user knows them
    ids, mask : Tensor
        (B, C') as the cache holds them
    """

    long_ids: Tensor
    ids: Tensor
    mask: Tensor


def short_prompt(
    pruning: Pruning,
    ids: Tensor,
    mask: Tensor | None,
    images: Any,
    before: Before | None = None,
) -> ShortPrompt:
    """Prune the images of a prompt and put them in.

    Parameters
    ----------
    ids : Tensor
        (B, L) int64, with as many placeholders for each image as stock sends tokens
    mask : Tensor | None
        (B, L), 1 where a column is no padding; None for all
    images : Any
        the family's: those of the prompt, or all of the conversation; of the latter, what stands
        `before` is not encoded again
    before : Before | None
        of the conversation; none by default

    Raises
    ------
    LlavaHvpError
        images and placeholders do not match, or the method cannot run
    """
    token = pruning.host_model.model.config.image_token_id
    placeholder = (ids == token).cpu()
    real = torch.ones_like(placeholder) if mask is None else mask.bool().cpu()
    new, held = _new_images(placeholder, images, before, token)
    conversation = ids if before is None else torch.cat((before.long_ids, ids), dim=1)
    inside = real if before is None else _with(before.long_ids, real)
    rows = [conversation[row][inside[row].to(ids.device)] for row in held]
    embed = pruning.host_model.model.get_input_embeddings()
    packed = images.packed(new, rows, _dtype(embed)) if new else None
    features = [] if packed is None else packed.features
    shortened = shorten(
        placeholder,
        real,
        [images.stock[n] for n in new],
        [len(tokens) for tokens in features],
        pad_left=_pads_left(real),
        which=images.columns,
    )
    short_ids = shortened.take(ids, _padding_id(pruning))
    whole = torch.ones_like(ids) if mask is None else mask.long()
    embeds = embed(short_ids)
    if features:
        tokens = torch.cat(features).to(embeds.device, embeds.dtype)
        visual = shortened.visual.to(embeds.device)[..., None]
        embeds = embeds.masked_scatter(visual, tokens)
    places = tuple(
        tuple(n for n, place in enumerate(held) if place == row) for row in range(len(ids))
    )
    return ShortPrompt(shortened, short_ids, shortened.take(whole, 0), embeds, packed, places)


def _new_images(
    placeholder: Tensor, images: Any, before: Before | None, token: int
) -> tuple[list[int], list[int]]:
    """Numbers of the images that the prompt holds, and the row of each."""
    counts = placeholder.sum(1).tolist()
    earlier = [0] * len(counts)
    if before is not None and sum(images.stock) > sum(counts):
        earlier = (before.long_ids == token).sum(1).tolist()
    # Of each row what stands before comes first, so that its images are told from the new ones.
    pairs = [n for pair in zip(earlier, counts, strict=True) for n in pair]
    new: list[int] = []
    rows: list[int] = []
    first = 0
    for place, count in enumerate(images_of_rows(pairs, images.stock)):
        if place % 2:
            new += range(first, first + count)
            rows += [place // 2] * count
        first += count
    return new, rows


def _with(before: Tensor, real: Tensor) -> Tensor:
    return torch.cat((torch.ones(before.shape, dtype=torch.bool), real), dim=1)


def _pads_left(real: Tensor) -> bool:
    """Where a batch has its padding; left, as generation wants it, where it has none."""
    return not (bool(real[:, 0].all()) and not bool(real.all()))


def _dtype(embed: Any) -> torch.dtype:
    dtype: torch.dtype = embed.weight.dtype
    return dtype


def _padding_id(pruning: Pruning) -> int:
    """What new padding holds: masked, so that any id does."""
    config = pruning.host_model.model.config
    known = (getattr(c, "pad_token_id", None) for c in (config, config.get_text_config()))
    return next((int(n) for n in known if n is not None and n >= 0), 0)


def conversation_before(
    note: CacheNote | None, ids: Tensor, mask: Tensor | None, cached: int, token: int
) -> tuple[Before, Tensor, Tensor | None]:
    """A conversation's ids and mask apart: what the cache holds, and what comes anew.

    Parameters
    ----------
    ids, mask : Tensor | None
        (B, L) of the whole conversation as the user knows it
    cached : int
        columns that the cache holds

    Raises
    ------
    UnsupportedModelError
        the ids are not those that the cache was filled with
    """
    if note is None:
        if (ids[:, :cached] == token).any():
            raise UnsupportedModelError(
                f"past_key_values holds {cached} columns that were not filled by this pruned "
                "model, and images stand in them: begin with an empty cache"
            )
        held = ids[:, :cached]
        note = CacheNote(held, held, torch.ones_like(held), held[:, :1] * 0)
    known = note.long_ids.shape[1]
    long = cached + note.removed
    if (
        cached < note.ids.shape[1]
        or ids.shape[1] <= long
        or len(ids) != len(note.long_ids)
        or not torch.equal(ids[:, :known], note.long_ids.to(ids.device))
    ):
        raise UnsupportedModelError(
            f"input_ids of shape {tuple(ids.shape)} with past_key_values of {cached} columns: give "
            f"the ids of the whole conversation, whose first {known} are those that the cache was "
            "filled with, and an empty cache where they are not"
        )
    since = ids[:, known:long]
    told = torch.ones_like(ids) if mask is None else mask.long()
    before = Before(
        ids[:, :long],
        torch.cat((note.ids.to(ids.device), since), dim=1),
        short_mask(note, told[:, :long], cached, 0),
    )
    return before, ids[:, long:], None if mask is None else mask[:, long:]
