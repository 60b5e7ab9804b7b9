"""A stage of a method, on a prompt that is running: score, choose, merge, drop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_hvp.decoder.rows import attention_of, rope_alone
from llava_hvp.decoder.run import PromptRun
from llava_hvp.decoder.sequence import Level, MergedTokens, drop
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.language import LanguageContext
from llava_hvp.methods.masks import top_k


def apply_stage(run: PromptRun, number: int, layer: Any, states: Tensor, given: dict) -> Tensor:
    """Drop before a layer what a stage does not keep; returns the states that are left.

    Parameters
    ----------
    number : int
        of the stage
    layer : Any
        the layer that is about to run
    states : Tensor
        (B, n, D), what it was to get
    given : dict
        the arguments that the decoder gave it
    """
    level, method = run.level, run.plan.method
    kept = tuple(min(row[number], count) for row, count in zip(run.kept, level.counts, strict=True))
    if kept == level.counts:
        return states
    scores = method.scores(_context(run, number, layer, states, given))
    run.projected.clear()
    counts = torch.tensor(kept, device=states.device)[:, None]
    stays = top_k(scores, counts, among=level.visual)
    merged = _merged(method, level, states, scores, kept)
    stage = run.plan.stages[number]
    level, states, _ = drop(level, states, stays, kept, stage.layer, merged, run.prompt.tails)
    run.go_on(level)
    return states


def _context(
    run: PromptRun, number: int, layer: Any, states: Tensor, given: dict
) -> LanguageContext:
    stage, level = run.plan.stages[number], run.level
    raters = run.raters
    if stage.reads == "last" or raters is None:
        raters = torch.ones_like(level.valid[:, :1])
    rows = raters.shape[1]
    columns = torch.arange(level.length - rows, level.length, device=states.device)
    if stage.of == "next":
        normed = layer.input_layernorm(states)
        queries = layer.self_attn.q_proj(normed[:, columns])
        keys = layer.self_attn.k_proj(normed)
    else:
        layer = run.decoder.layers[stage.layer - 1]
        if run.projected.keys() != {"q", "k"}:
            raise UnsupportedModelError(
                f"the attention of decoder layer {stage.layer - 1} did not pass through q_proj and "
                "k_proj (a fused or compiled attention?): load the model without it"
            )
        queries, keys = run.projected["q"][:, columns], run.projected["k"]
    rope = run.rope(layer, states, given)
    queries, keys = queries.to(states.device), keys.to(states.device)
    scale = rope[0].shape[-1] ** -0.5
    return LanguageContext(
        attention=attention_of(queries, keys, rope, columns, level.valid, scale),
        raters=raters,
        visual=level.visual,
        valid=level.valid,
        rope=rope_alone(rope, columns, scale) if run.plan.method.reads_rope else None,
        stage=number,
    )


def _merged(
    method: Any, level: Level, states: Tensor, scores: Tensor, kept: tuple[int, ...]
) -> MergedTokens | None:
    """What a method makes of the tokens that go, row by row; None where it makes nothing."""
    counts = tuple(
        method.merges(before - now) for before, now in zip(level.counts, kept, strict=True)
    )
    width = max(counts)
    if not width:
        return None
    best_first = scores.masked_fill(~level.visual, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    batch = len(counts)
    made = states.new_zeros(batch, width, states.shape[-1])
    columns = level.columns.new_zeros(batch, width)
    for row, (before, now, count) in enumerate(zip(level.counts, kept, counts, strict=True)):
        if count:
            dropped = best_first[row, now:before]
            made[row, :count], centres = method.merge(states[row, dropped], dropped)
            columns[row, :count] = level.columns[row, centres]
    ranks = torch.arange(width, device=states.device)
    valid = ranks < torch.tensor(counts, device=states.device)[:, None]
    return MergedTokens(made, valid, columns, counts)
