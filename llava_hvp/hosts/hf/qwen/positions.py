"""M-RoPE positions of a shortened prompt: every column keeps those that it has in the long one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.short_prompt import ShortPrompt
from llava_hvp.hosts.hf.versions import release
from llava_hvp.pruning.pruning import Pruning

BY_TYPES = (5, 0)  # from here on mm_token_type_ids say where images stand


@dataclass(frozen=True)
class Positions:
    """Positions of a shortened prompt.

    Parameters
    ----------
    ids : Tensor
        (3, B, L') int64: time, row and column
    next : Tensor
        (B, 1), the position of what follows
    real : Tensor
        (B, 1), columns of each row that are no padding
    """

    ids: Tensor
    next: Tensor
    real: Tensor

    @property
    def deltas(self) -> Tensor:
        """(B, 1), what stock adds to a column's number to go on, as its release counts columns."""
        counted = self.real if release() >= BY_TYPES else self.ids.shape[2]
        return self.next - counted


# Per thread: the prompt that `generate` works on.
_PROMPT: ContextVar[Positions | None] = ContextVar("llava_hvp_positions", default=None)


def positions_of(
    inner: Any, given: dict[str, Any], mask: Tensor | None, prompt: ShortPrompt
) -> Positions:
    """Positions of a prompt that was shortened, by the model's own `get_rope_index` of the long.

    Parameters
    ----------
    inner : Any
        the Qwen2_5_VLModel
    given : dict[str, Any]
        the call's arguments; `position_ids` of (3, B, L) are taken as they are
    mask : Tensor | None
        (B, L) of the long prompt

    Raises
    ------
    UnsupportedModelError
        where nothing says what the positions are
    """
    ids, positions = given["input_ids"], given.get("position_ids")
    if positions is not None and tuple(positions.shape) != (3, *ids.shape):
        raise UnsupportedModelError(
            f"position_ids of shape {tuple(positions.shape)} for Qwen2.5-VL: give (3, batch, "
            "tokens), or leave them out"
        )
    if positions is None:
        wanted = {"input_ids": ids, "image_grid_thw": given["image_grid_thw"]}
        if release() >= BY_TYPES:
            wanted["mm_token_type_ids"] = given.get("mm_token_type_ids")
            if wanted["mm_token_type_ids"] is None:
                raise UnsupportedModelError(
                    "pixel_values without mm_token_type_ids, by which Qwen2.5-VL places images: "
                    "pass on all that the processor gives"
                )
        positions, _ = type(inner).get_rope_index(inner, **wanted, attention_mask=mask)
    real = torch.ones_like(ids) if mask is None else mask.long()
    following = positions.masked_fill(real.to(positions.device) == 0, 0).amax((0, 2))[:, None] + 1
    short = torch.stack([prompt.shortened.take(axis, 0) for axis in positions])
    return Positions(short, following, prompt.mask.sum(1, keepdim=True).to(following.device))


class RopeIndex:
    """Stands in for the `get_rope_index` of the model inside: `generate`'s prompt is short."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        prompt = _PROMPT.get()
        if prompt is None:
            inner = self.pruning.host_model.model.model
            found: tuple[Tensor, Tensor] = type(inner).get_rope_index(inner, *args, **kwargs)
            return found
        mask = kwargs.get("attention_mask")  # of as many rows as there are beams
        times = 1 if mask is None else len(mask) // prompt.ids.shape[1]
        return prompt.ids.repeat_interleave(times, 1), prompt.deltas.repeat_interleave(times, 0)


@contextmanager
def generating(positions: Positions | None) -> Iterator[None]:
    """`generate` of a prompt of these positions runs inside the block; None for stock's own."""
    token = _PROMPT.set(positions)
    try:
        yield
    finally:
        _PROMPT.reset(token)
