"""One forward pass of a decoder: which tokens are there, and what its layers are given."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_hvp.decoder.masks import causal_mask, grown, step_mask
from llava_hvp.decoder.plan import DropPlan
from llava_hvp.decoder.prompt import Prompt
from llava_hvp.decoder.rows import Rope
from llava_hvp.decoder.sequence import Generation, Level, renumbered


@dataclass(eq=False)
class Run:
    """A forward pass; see PromptRun and StepRun.

    Parameters
    ----------
    decoder : Any
        that runs
    generation : Generation
        what is known of the prompt
    """

    decoder: Any
    generation: Generation
    _given: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)

    @property
    def attention(self) -> str:
        """The decoder's attention: "eager", "sdpa" or a flash attention."""
        return str(self.decoder.config._attn_implementation)

    @property
    def total(self) -> int:
        """Positions that the rotary table must reach."""
        raise NotImplementedError

    def arguments(self, layer: int, states: Tensor, given: dict) -> dict[str, Any]:
        """What a layer gets in place of what the decoder made for tokens that are gone now."""
        level = self.generation.at(layer)
        if level.layer == 0:
            return {}
        if level.layer not in self._given:
            self._given[level.layer] = self._made(level, states, given)
        return self._given[level.layer]

    def _made(self, level: Level, states: Tensor, given: dict) -> dict[str, Any]:
        raise NotImplementedError

    def _rope_at(self, states: Tensor, positions: Tensor) -> Rope:
        cos, sin = self.decoder.rotary_emb(states, positions)
        return cos, sin


@dataclass(eq=False)
class PromptRun(Run):
    """The forward pass of a prompt with images.

    Parameters
    ----------
    plan : DropPlan
        what it drops
    prompt : Prompt
        the rows that run
    announced : Prompt
        as they were announced; `prompt` may hold each of them several times
    kept : tuple[tuple[int, ...], ...]
        visual tokens that are chosen to stay of each row at each stage
    raters : Tensor | None
        (B, R) bool, which of the last tokens score
    cache : Any
        that the prompt goes into
    reading : int | None
        the layer whose queries and keys are wanted now
    projected : dict[str, Tensor]
        those, as "q" and "k"
    """

    plan: DropPlan
    prompt: Prompt
    announced: Prompt
    kept: tuple[tuple[int, ...], ...]
    raters: Tensor | None
    cache: Any
    reading: int | None = None
    projected: dict[str, Tensor] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """The tokens that are there now."""
        return self.generation.levels[-1]

    @property
    def total(self) -> int:
        return self.generation.length

    def begin(self, positions: Tensor) -> None:
        """Start with all tokens, at these positions, (1 or B, n)."""
        prompt, shape = self.prompt, self.prompt.valid.shape
        columns = torch.arange(shape[1], device=prompt.valid.device).expand(shape)
        level = Level(
            0,
            columns,
            torch.zeros_like(prompt.valid),
            prompt.visual,
            prompt.valid,
            positions.to(columns.device).expand(shape),
            prompt.visual_counts,
            prompt.lengths,
        )
        self.generation.levels.append(level)

    def go_on(self, level: Level) -> None:
        """Go on with fewer tokens, positions closed up where the method wants it."""
        if self.generation.renumbers:
            end = self.generation.levels[0].positions[:, -1:]
            level.positions = renumbered(level, end, self.generation.gone(level))
        self.generation.levels.append(level)

    def rope(self, layer: Any, states: Tensor, given: dict) -> Rope:
        """cos and sin of the tokens that are there now."""
        positions = self.level.positions
        if given.get("position_embeddings") is not None:
            return self._rope_at(states, positions)
        cos, sin = layer.self_attn.rotary_emb(states, seq_len=self.total)
        return cos[positions], sin[positions]

    def _made(self, level: Level, states: Tensor, given: dict) -> dict[str, Any]:
        steps = torch.arange(level.length, device=states.device)
        made: dict[str, Any] = {"attention_mask": self._mask(level, states, given)}
        if given.get("position_embeddings") is None:
            made["position_ids"] = level.positions
        else:
            # Positions with gaps pass for several packed sequences; RoPE travels by itself.
            made["position_ids"] = steps[None]
            made["position_embeddings"] = self._rope_at(states, level.positions)
        if given.get("cache_position") is not None:
            made["cache_position"] = steps
        return made

    def _mask(self, level: Level, states: Tensor, given: dict) -> Tensor | None:
        if self.attention.startswith("flash"):
            return level.valid if level.ragged else None
        if level.ragged or self.attention == "eager" or given.get("output_attentions"):
            return causal_mask(level.valid, states.dtype)
        return None  # the attention is causal by itself


@dataclass(eq=False)
class StepRun(Run):
    """The forward pass of one new token after such a prompt.

    Parameters
    ----------
    past : int
        tokens that the first layer has seen
    """

    past: int

    @property
    def total(self) -> int:
        return self.past + 1

    def _made(self, level: Level, states: Tensor, given: dict) -> dict[str, Any]:
        made: dict[str, Any] = {"attention_mask": self._mask(level, states)}
        if self.generation.renumbers:
            positions = given["position_ids"] - self.generation.gone(level)
            made["position_ids"] = positions
            if given.get("position_embeddings") is not None:
                made["position_embeddings"] = self._rope_at(states, positions)
        return made

    def _mask(self, level: Level, states: Tensor) -> Tensor | None:
        if not level.ragged:
            return None
        new = self.past - self.generation.length + 1
        if self.attention.startswith("flash"):
            return grown(level.valid, new)
        return step_mask(level.valid, new, states.dtype)


def current(decoder: Any) -> PromptRun | StepRun | None:
    """The forward pass that this thread is in, if it is one of this decoder."""
    run = _CURRENT.get()
    return run if run is not None and run.decoder is decoder else None


def set_current(run: PromptRun | StepRun | None) -> None:
    """Begin a forward pass, or end it."""
    _CURRENT.set(run)


_CURRENT: ContextVar[PromptRun | StepRun | None] = ContextVar("llava_hvp_decoder_run", default=None)
