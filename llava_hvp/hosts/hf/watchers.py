"""What looks on while ids come is shown the prompt as the processor made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def long_again(ids: Tensor, long: Tensor, short: int) -> Tensor:
    """Rows of ids with the long prompt in place of the short one; beams follow their prompt."""
    prompts = long.to(ids.device).repeat_interleave(len(ids) // len(long), dim=0)
    return torch.cat((prompts, ids[:, short:]), dim=1)


def shown_long(given: dict[str, Any], long: Tensor, short: int) -> dict[str, Any]:
    """Everything of the user's that is shown ids while they come, shown the long ones."""
    changed: dict[str, Any] = {}
    for name, shown in (("stopping_criteria", _Criterion), ("logits_processor", _Processor)):
        if given.get(name):
            changed[name] = type(given[name])(shown(each, long, short) for each in given[name])
    allowed = given.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat((long[row].to(ids.device), ids[short:]))
        )
    if given.get("streamer") is not None:
        changed["streamer"] = _Streamed(given["streamer"], long)
    return changed


@dataclass
class _Processor:
    """A logits processor that sees the long prompt; of others than these two stock wants names."""

    inner: Any
    long: Tensor
    short: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.inner(long_again(input_ids, self.long, self.short), scores)
        return found


class _Criterion(_Processor):
    """A stopping criterion that sees the long prompt."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.inner(long_again(input_ids, self.long, self.short), scores, **kwargs)


class _Streamed:
    """A streamer whose first ids are the long prompt."""

    def __init__(self, inner: Any, long: Tensor) -> None:
        self.inner = inner
        self._prompt: Tensor | None = long.cpu()

    def put(self, value: Any) -> None:
        """Hand ids on; of the prompt, the long ones."""
        prompt, self._prompt = self._prompt, None
        self.inner.put(value if prompt is None else prompt)

    def end(self) -> None:
        """Nothing comes any more."""
        self.inner.end()
