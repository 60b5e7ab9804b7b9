"""A shortened prompt, announced to a language model that drops tokens of it inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import DecodingError
from llava_hvp.hosts.hf.short_prompt import ShortPrompt
from llava_hvp.pruning.expected import drops, expect, no_labels, record_all
from llava_hvp.pruning.pruning import Pruning


def announce(pruning: Pruning, prompt: ShortPrompt, given: dict[str, Any]) -> None:
    """Record the images of a prompt; where the language model drops tokens of it, once it has.

    Parameters
    ----------
    given : dict[str, Any]
        the arguments of the call

    Raises
    ------
    DecodingError
        a call whose tokens cannot be dropped there
    """
    packed = prompt.packed
    if packed is None:
        return
    rows = prompt.images_of_rows
    if not drops(pruning, packed, rows):
        record_all(pruning, packed)
        return
    if given.get("labels") is not None:
        raise no_labels(pruning)
    if pruning.model.training and torch.is_grad_enabled():
        raise _refused(pruning, "this model is in training mode", "call model.eval() first")
    visual, valid = prompt.shortened.visual, prompt.mask.bool().cpu()
    _check_padding(pruning, visual, valid)
    place = prompt.embeds.device
    expect(pruning, packed, rows, prompt.embeds, visual.to(place), valid.to(place))


def _check_padding(pruning: Pruning, visual: Tensor, valid: Tensor) -> None:
    """Raise DecodingError unless rows end at the right, and images are no padding."""
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise _refused(
            pruning,
            "the attention_mask has padding behind a row's tokens",
            "pad on the left, as with processor.tokenizer.padding_side = 'left'",
        )
    if bool((visual & ~valid).any()):
        raise _refused(
            pruning,
            "the attention_mask leaves tokens of an image out",
            "give the mask that the processor makes",
        )


def _refused(pruning: Pruning, what: str, remedy: str) -> DecodingError:
    name = "" if pruning.inside is None else pruning.inside.name
    return DecodingError(f"{name} drops tokens inside the language model, and {what}: {remedy}")
