"""A forward pass that is given pixels runs on a shortened, embedded prompt instead.

As pre-hooks of one model: they see every call of it, through wrappers and compilers, and stock's
`forward` is what runs after them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.cache import (
    CacheNote,
    check_alike,
    length_of,
    new_cache,
    note_of,
    put_note,
    short_mask,
)
from llava_hvp.hosts.hf.inside import announce
from llava_hvp.hosts.hf.qwen.positions import positions_of
from llava_hvp.hosts.hf.refusals import (
    PER_TOKEN,
    check_arguments,
    check_encoded,
    check_videos,
    filled_cache,
)
from llava_hvp.hosts.hf.short_prompt import ShortPrompt, short_prompt
from llava_hvp.pruning.pruning import Pruning

IGNORED = -100  # a label that no loss counts
PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class ForwardHook:
    """A forward pre-hook, for the model and for the one inside it that has no head."""

    pruning: Pruning

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # What a compiled decoding step passes through is read here, and no more.
        noted = getattr(kwargs.get("past_key_values"), "llava_hvp", None) is not None
        seen = any(kwargs.get(name) is not None for name in PIXELS)
        if len(args) < 2 and not noted and not seen and not kwargs.get("mm_encoder_outputs"):
            return None
        return _told(self.pruning, module, args, kwargs)


@torch.compiler.disable
def _told(
    pruning: Pruning, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    with pruning.told():
        return _rewritten(pruning, module, args, kwargs)


def _rewritten(
    pruning: Pruning, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with pixels, or with a cache that was filled by a pruned one."""
    if args:
        kwargs = {**_named(module, args), **kwargs}
    pixels = kwargs.get("pixel_values")
    if pixels is None or len(pixels) == 0:
        check_videos(kwargs)
        check_encoded(kwargs)
        note = note_of(kwargs.get("past_key_values"))
        check_alike(note, pruning.config)
        return (), kwargs if note is None else {**kwargs, **_next_step(note, kwargs)}
    return (), short_call(pruning, kwargs)


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def short_call(pruning: Pruning, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass with the images pruned and put in.

    Raises
    ------
    LlavaHvpError
        what cannot be pruned rightly
    """
    config = pruning.host_model.model.config
    check_arguments(given, config)
    ids, mask = given["input_ids"], given.get("attention_mask")
    cache = given.get("past_key_values")
    cached, note = length_of(cache), note_of(cache)
    check_alike(note, pruning.config)
    new_mask = None if mask is None else mask[:, -ids.shape[1] :]
    host: Any = pruning.host_model
    if cached and host.family.keeps_positions:
        raise filled_cache()
    images = host.family.images(pruning, given["pixel_values"], given)
    prompt = short_prompt(pruning, ids, new_mask, images)
    rest = {**given, "input_ids": None, "inputs_embeds": prompt.embeds, "pixel_values": None}
    rest |= {name: None for name in host.family.beside if name in rest}
    following = None
    if host.family.keeps_positions:
        positions = positions_of(host.model.model, given, new_mask, prompt)
        given = {**given, "position_ids": None}
        rest["position_ids"], following = positions.ids, positions.next
        host.model.model.rope_deltas = positions.deltas  # as stock leaves them
    if prompt.removed:
        rest |= _per_token(given, prompt, mask, note, cached)
    if cached == 0 and not pruning.host_model.model.training:
        _note(rest, ids, prompt, given.get("position_ids"), following, pruning)
    announce(pruning, prompt, given)
    return rest


def _per_token(
    given: dict[str, Any],
    prompt: ShortPrompt,
    mask: Tensor | None,
    note: CacheNote | None,
    cached: int,
) -> dict[str, Any]:
    """What goes beside the ids, column by column, for a prompt that was shortened."""
    new, short = given["input_ids"].shape[1], prompt.shortened
    changed: dict[str, Any] = {}
    if mask is not None or not bool(prompt.mask.all()) or note is not None:
        whole = prompt.mask
        if cached:
            told = torch.ones_like(whole[:, :1]).expand(-1, cached) if mask is None else mask
            before = told[:, : told.shape[1] - new] if mask is not None else told
            before = before if note is None else short_mask(note, before, cached, 0)
            whole = torch.cat((before.to(whole.device, whole.dtype), whole), dim=1)
        changed["attention_mask"] = whole if mask is None else whole.to(mask.dtype)
    if given.get("labels") is not None:
        changed["labels"] = short.take(given["labels"], IGNORED)
    for name in PER_TOKEN:
        if given.get(name) is not None:
            changed[name] = short.take(given[name], 0)
    if given.get("position_ids") is not None:
        real = mask[:, -new:] if mask is not None else torch.ones_like(given["input_ids"])
        changed["position_ids"] = closed_positions(given["position_ids"], real, prompt)
    if given.get("cache_position") is not None:
        place = given["cache_position"].device
        changed["cache_position"] = torch.arange(cached, cached + prompt.ids.shape[1], device=place)
    return changed


def closed_positions(positions: Tensor, real: Tensor, prompt: ShortPrompt) -> Tensor:
    """(B, L') of (B, L) position ids that count a row's real columns: they go on counting.

    Raises UnsupportedModelError where they do not count on by one, as of packed sequences.
    """
    if positions.ndim != 2:
        raise UnsupportedModelError(
            f"position_ids of shape {tuple(positions.shape)}: give (batch, tokens), or leave them "
            "out"
        )
    real = real.to(positions.device).bool()
    positions = positions.expand(real.shape)
    steps = real.long().cumsum(1) - 1
    first = (positions - steps).gather(1, real.int().argmax(1, keepdim=True))
    if not torch.equal((steps + first)[real], positions[real]):
        raise UnsupportedModelError(
            "position_ids that do not count on by one within a row, as of packed sequences: a "
            "pruned prompt closes its positions up; leave them out, and give a row a sequence"
        )
    mask = prompt.mask.to(positions.device)
    return ((mask.cumsum(1) - 1).clamp(min=0) + first) * mask


def _note(
    rest: dict[str, Any],
    ids: Tensor,
    prompt: ShortPrompt,
    positions: Tensor | None,
    following: Tensor | None,
    pruning: Pruning,
) -> None:
    """Give the call a cache with a note, where stock would make one without."""
    text = pruning.host_model.model.config.get_text_config()
    use = rest.get("use_cache")
    if not (text.use_cache if use is None else use):
        return
    if rest.get("past_key_values") is None:
        rest["past_key_values"] = new_cache(text)
    rows, removed = len(ids), ids.shape[1] - prompt.ids.shape[1]
    off = torch.full((rows, 1), removed)
    if positions is not None and prompt.removed:
        now = rest["position_ids"].amax(1, keepdim=True).cpu()
        off = positions.amax(1, keepdim=True).expand(rows, 1).cpu() - now
    note = CacheNote(ids, prompt.ids, prompt.mask, off, following, pruning.config)
    put_note(rest["past_key_values"], note)


def _next_step(note: CacheNote, given: dict[str, Any]) -> dict[str, Any]:
    """What a hand-written loop counts by the long prompt, counted by what the cache holds.

    Raises UnsupportedModelError for counts that are neither.
    """
    sent = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    new, cached = sent.shape[1], length_of(given["past_key_values"])
    if cached < note.ids.shape[1]:
        raise UnsupportedModelError(
            f"past_key_values of {cached} columns, cropped into the {note.ids.shape[1]} that the "
            "pruned prompt has: begin with an empty cache"
        )
    changed: dict[str, Any] = {}
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor):
        changed["attention_mask"] = short_mask(note, mask, cached, new)
    elif not bool(note.mask.all()):
        ones = torch.ones(len(note.mask), cached + new - note.ids.shape[1], dtype=torch.int64)
        changed["attention_mask"] = torch.cat((note.mask, ones.to(note.mask.device)), dim=1)
    positions = given.get("position_ids")
    if note.following is not None:
        if positions is None:
            steps = torch.arange(cached - note.ids.shape[1], cached - note.ids.shape[1] + new)
            changed["position_ids"] = (note.following + steps.to(note.following.device)).expand(
                3, -1, -1
            )
    elif positions is not None:
        changed["position_ids"] = _next_positions(note, positions, cached)
    if given.get("cache_position") is not None:
        place = given["cache_position"].device
        changed["cache_position"] = torch.arange(cached, cached + new, device=place)
    return changed


def _next_positions(note: CacheNote, positions: Tensor, cached: int) -> Tensor:
    first = positions[:, :1].cpu()
    since = cached - note.ids.shape[1]
    # By columns, or by the row's real ones.
    known = (torch.tensor([[cached]]), note.mask.cpu().sum(1, keepdim=True) + since)
    if any(bool((first == short).all()) for short in known):
        return positions
    if any(bool((first - note.positions == short).all()) for short in known):
        return positions - note.positions.to(positions.device)
    raise UnsupportedModelError(
        f"position_ids that begin at {first[:, 0].tolist()} after a pruned prompt of "
        f"{note.ids.shape[1]} columns, {note.long_ids.shape[1]} before pruning, and {since} tokens "
        "more: go on counting from the prompt"
    )
