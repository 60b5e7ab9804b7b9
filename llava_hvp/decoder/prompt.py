"""Prompts with images on their way into a decoder: where their visual tokens stand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_hvp.errors import DecodingError

if TYPE_CHECKING:
    from llava_hvp.decoder.plan import DropPlan
    from llava_hvp.decoder.sequence import Level


@dataclass(eq=False)
class Prompt:
    """B rows of n tokens, padded on the left, as a decoder gets them.

    Parameters
    ----------
    visual : Tensor
        (B, n) bool, the tokens that the host put in for images, newlines included
    valid : Tensor
        (B, n) bool, all but padding
    lengths : tuple[int, ...]
        valid tokens of each row
    images : tuple[tuple[int, ...], ...]
        visual tokens of each image of each row, in order
    tails : tuple[int, ...]
        tokens of each row behind its last visual one; of a row without any, all that are valid
    on_prefill : Callable[[list[Level]], None] | None
        called once with the tokens that entered each stretch of layers
    plan : DropPlan
        what is dropped of it, once it is announced
    """

    visual: Tensor
    valid: Tensor
    lengths: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    tails: tuple[int, ...]
    on_prefill: Callable[[list[Level]], None] | None = None
    ran: bool = field(default=False, init=False)
    plan: DropPlan = field(init=False)

    @property
    def visual_counts(self) -> tuple[int, ...]:
        """Visual tokens of each row."""
        return tuple(map(sum, self.images))

    def repeated(self, times: int) -> Prompt:
        """Each row so many times, as for the beams of a search."""
        if times == 1:
            return self

        def of(values: tuple) -> tuple:
            return tuple(value for value in values for _ in range(times))

        return Prompt(
            self.visual.repeat_interleave(times, 0),
            self.valid.repeat_interleave(times, 0),
            of(self.lengths),
            of(self.images),
            of(self.tails),
        )


def announce(embeds: Tensor, prompt: Prompt, decoder: Any) -> None:
    """Say what prompt these embeddings are, to the decoder that will get them or copies of them."""
    embeds.llava_hvp_prompt = prompt  # type: ignore[attr-defined]
    _NEWEST.set((weakref.ref(decoder), weakref.ref(embeds)))


def withdraw() -> None:
    """Of what this thread announced last, no copies come any more."""
    _NEWEST.set(None)


def find(embeds: Tensor, decoder: Any) -> tuple[Prompt, int] | None:
    """The prompt that embeddings are, and how often each row of it stands in them.

    `generate` hands on copies, a row for each beam: they are known by what is in them. None for
    embeddings that nobody announced, as text alone.

    Raises DecodingError where an announced prompt is still to come and something else came: to go
    on would be to prune nothing without a word.
    """
    found = getattr(embeds, "llava_hvp_prompt", None)
    if found is not None:
        return found, 1
    whose, reference = _NEWEST.get() or (None, None)
    newest = None if reference is None else reference()
    if newest is None or whose is None or whose() is not decoder:  # given up, or of another model
        return None
    prompt: Prompt = newest.llava_hvp_prompt  # type: ignore[attr-defined]
    times, rest = divmod(len(embeds), len(newest))
    if not rest and embeds.shape[1:] == newest.shape[1:]:
        copies = newest.repeat_interleave(times, 0).to(embeds)
        if torch.equal(copies, embeds):
            return prompt, times
    if not prompt.ran:
        raise DecodingError(
            f"the language model got embeddings of {tuple(embeds.shape)} that are not those of the "
            f"prompt with images, {tuple(newest.shape)}: what changes them on the way (prompt "
            "tuning, chunked prefill) cannot be pruned inside the language model"
        )
    return None


_NEWEST: ContextVar[tuple[weakref.ref[Any], weakref.ref[Tensor]] | None] = ContextVar(
    "llava_hvp_newest_prompt", default=None
)
