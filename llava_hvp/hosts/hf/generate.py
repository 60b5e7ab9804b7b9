"""`generate` of one model: stock's on the shortened prompt, its results with the long one in front.

Whoever calls it counts the prompt as the processor made it, so that every length and every row of
ids that goes in or out is in long columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_hvp.decoder.prompt import withdraw
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.cache import (
    CacheNote,
    check_alike,
    length_of,
    note_of,
    put_note,
    short_mask,
    take_note,
)
from llava_hvp.hosts.hf.forward import closed_positions
from llava_hvp.hosts.hf.inside import announce
from llava_hvp.hosts.hf.qwen.positions import BY_TYPES, generating, positions_of
from llava_hvp.hosts.hf.refusals import (
    PER_TOKEN,
    check_arguments,
    check_encoded,
    check_generation,
    check_videos,
    filled_cache,
    setting,
)
from llava_hvp.hosts.hf.short_prompt import Before, ShortPrompt, conversation_before, short_prompt
from llava_hvp.hosts.hf.versions import release
from llava_hvp.hosts.hf.watchers import long_again, shown_long
from llava_hvp.pruning.generate import Generate
from llava_hvp.pruning.pruning import Pruning

EMBEDS_ONLY_NEW = (5, 0)  # from here on `generate` cuts embeddings to what a cache does not hold


class ShortGenerate(Generate):
    """Runs stock's on the shortened prompt."""

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.pruning.told():
            return super().__call__(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [n for n in self.__signature__.parameters if n != "kwargs"]
        given = dict(zip(names, args, strict=False)) | kwargs
        pixels, cache = given.get("pixel_values"), given.get("past_key_values")
        if pixels is None or len(pixels) == 0:
            check_videos(given)
            check_encoded(given)
            if note_of(cache) is None:
                return self.stock(*args, **kwargs)
        check_alike(note_of(cache), self.pruning.config)
        if given.get("inputs") is not None and given.get("input_ids") is None:
            given["input_ids"] = given.pop("inputs")
        note = take_note(cache)
        return _generate(self.pruning, self.stock, given, note)


def _generate(
    pruning: Pruning, stock: Callable[..., Any], given: dict[str, Any], note: CacheNote | None
) -> Any:
    """One call with images, or that goes on from a cache with some."""
    model = pruning.host_model.model
    configs = [c for c in (given.get("generation_config"), model.generation_config) if c]
    check_arguments(given, model.config)
    check_generation(given, configs)
    ids, mask = given["input_ids"], given.get("attention_mask")
    told = mask if mask is not None else _mask_of(ids, given, configs)
    cached = length_of(given.get("past_key_values"))
    if given.get("pixel_values") is None and note is not None and not _is_whole(note, ids):
        return _go_on(stock, given, note, cached)
    host: Any = pruning.host_model
    keeps = host.family.keeps_positions
    if keeps:
        _check_kept(given, configs, cached)
    images = host.family.images(pruning, given.get("pixel_values"), given)
    prompt, before = _prompt(pruning, given, told, images, note, cached)
    long, whole, short_whole = ids, prompt.ids, prompt.mask
    if before is not None:
        whole = torch.cat((before.ids, prompt.ids), dim=1)
        short_whole = torch.cat((before.mask.to(prompt.mask.device), prompt.mask), dim=1)
    call = {k: v for k, v in given.items() if k not in ("pixel_values", *host.family.beside)}
    call |= _as_embeds(model, prompt, before, whole)
    removed = long.shape[1] - whole.shape[1]
    if removed or prompt.removed:
        call |= _short_arguments(given, prompt, before, told, short_whole)
        call |= _lengths(given, configs, removed)
        call |= shown_long(given, long, whole.shape[1])
        call.pop("cache_position", None)
    positions = positions_of(model.model, given, told, prompt) if keeps else None
    if keeps and release() >= BY_TYPES:  # stock asks for positions where a grid is given
        call["image_grid_thw"] = given["image_grid_thw"]
    announce(pruning, prompt, given)
    try:
        with generating(positions):
            result = stock(**call)
    finally:
        # A call that failed may be held on to, with its embeddings, and text come next.
        withdraw()
    following = None if positions is None else positions.next
    note = CacheNote(long, whole, short_whole, _off(told, short_whole), following, pruning.config)
    return _result(result, given, note)


def _check_kept(given: dict[str, Any], configs: list[Any], cached: int) -> None:
    """Raise UnsupportedModelError for what moves tokens that keep their positions."""
    if cached:
        raise filled_cache()
    if given.get("position_ids") is not None:
        raise UnsupportedModelError("position_ids in generate of Qwen2.5-VL: leave them out")
    if setting("use_cache", given, configs) is False:
        raise UnsupportedModelError("use_cache=False in generate of Qwen2.5-VL: leave it out")


def _prompt(
    pruning: Pruning,
    given: dict[str, Any],
    mask: Tensor,
    images: Any,
    note: CacheNote | None,
    cached: int,
) -> tuple[ShortPrompt, Before | None]:
    """The prompt shortened, and what a cache holds of the conversation before it."""
    ids = given["input_ids"]
    if not cached:
        return short_prompt(pruning, ids, mask, images), None
    token = pruning.host_model.model.config.image_token_id
    before, ids, new_mask = conversation_before(note, ids, mask, cached, token)
    if bool((ids == token).any()) and release() < EMBEDS_ONLY_NEW:
        raise UnsupportedModelError(
            "a new image with a filled past_key_values: generate of transformers 4 would leave it "
            "out; begin with an empty cache"
        )
    return short_prompt(pruning, ids, new_mask, images, before), before


def _is_whole(note: CacheNote, ids: Tensor) -> bool:
    """Whether ids begin with the prompt of a cache."""
    known = note.long_ids
    return ids.shape[1] > known.shape[1] and torch.equal(
        ids[:, : known.shape[1]], known.to(ids.device)
    )


def _go_on(stock: Callable[..., Any], given: dict[str, Any], note: CacheNote, cached: int) -> Any:
    """New text only, for a cache that holds the rest: nothing but the mask is counted long."""
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[1] > given["input_ids"].shape[1]:
        new = given["input_ids"].shape[1]
        given = {**given, "attention_mask": short_mask(note, mask, cached, new)}
    result = stock(**given)
    put_note(given["past_key_values"], note)
    return result


def _as_embeds(
    model: Any, prompt: ShortPrompt, before: Before | None, whole: Tensor
) -> dict[str, Any]:
    """The prompt as embeddings; of text alone its ids say it all."""
    if before is None:
        return {"input_ids": whole, "inputs_embeds": prompt.embeds}
    if not bool(prompt.shortened.visual.any()):
        return {"input_ids": whole}
    # What a cache holds is cut off again: any embeddings do.
    held = model.get_input_embeddings()(before.ids)
    return {"input_ids": whole, "inputs_embeds": torch.cat((held, prompt.embeds), dim=1)}


def _short_arguments(
    given: dict[str, Any],
    prompt: ShortPrompt,
    before: Before | None,
    long_mask: Tensor,
    mask: Tensor,
) -> dict[str, Any]:
    """What goes beside the ids, column by column."""
    changed: dict[str, Any] = {"attention_mask": mask}
    if given.get("attention_mask") is not None:
        changed["attention_mask"] = mask.to(given["attention_mask"].dtype)
    new = prompt.shortened.source.shape[1] if before is None else None
    for name in ("position_ids", *PER_TOKEN):
        value = given.get(name)
        if value is None:
            continue
        if new is None:
            raise UnsupportedModelError(f"{name} with a filled past_key_values: leave them out")
        if name == "position_ids":
            changed[name] = closed_positions(value, long_mask, prompt)
        else:
            changed[name] = prompt.shortened.take(value, 0)
    return changed


def _lengths(given: dict[str, Any], configs: list[Any], removed: int) -> dict[str, Any]:
    """`max_length` and `min_length`, which count the prompt, as arguments that count it short."""
    changed: dict[str, Any] = {}
    for name, by_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(name, given, configs)
        counted = setting(by_tokens, given, configs) is not None
        if length is None or counted or length == _default(name):
            continue
        changed[name] = max(0, length - removed)
        own = given.get("generation_config")
        if own is not None and getattr(own, name, None) is not None:
            # Of a config and an argument that both say it, releases differ in what they make.
            config = changed.setdefault("generation_config", copy.deepcopy(own))
            setattr(config, name, changed.pop(name))
    return changed


def _default(name: str) -> Any:
    """What a length is where nobody set it: on older releases, one that counts new tokens only."""
    from transformers import GenerationConfig

    return getattr(GenerationConfig(), name)


def _mask_of(ids: Tensor, given: dict[str, Any], configs: list[Any]) -> Tensor:
    """The mask that `generate` works out of padding where it is given none."""
    pad, end = (setting(name, given, configs) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _off(long: Tensor, short: Tensor) -> Tensor:
    """(B, 1): positions count real columns in `generate`."""
    return long.cpu().long().sum(1, keepdim=True) - short.cpu().long().sum(1, keepdim=True)


def _result(result: Any, given: dict[str, Any], note: CacheNote) -> Any:
    """The result with the long prompt in front, its cache with a note."""
    if isinstance(result, Tensor):
        cache = given.get("past_key_values")
        result = long_again(result, note.long_ids, note.ids.shape[1])
        rows = len(result)
    else:
        cache = getattr(result, "past_key_values", None)
        result.sequences = long_again(result.sequences, note.long_ids, note.ids.shape[1])
        rows = len(result.sequences)
    if cache is not None and rows == len(note.long_ids):  # of beams a cache holds more rows
        put_note(cache, note)
    return result
