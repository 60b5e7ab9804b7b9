"""A prompt on its way into a language model that drops tokens of it: announced, then recorded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_hvp.decoder.prompt import Prompt
from llava_hvp.decoder.sequence import Level
from llava_hvp.errors import DecodingError
from llava_hvp.pruning.inside import in_all_layers, in_layers
from llava_hvp.pruning.packing import PackedImages
from llava_hvp.pruning.pruning import Pruning

Rows = Sequence[Sequence[int]]  # the images of each row


def drops(pruning: Pruning, packed: PackedImages, rows: Rows) -> bool:
    """Whether the language model drops any token; else what stock gives can be given."""
    plan = pruning.drop_plan
    if plan is None:
        return False
    counts = tuple(tuple(len(packed.features[image]) for image in row) for row in rows)
    return plan.drops(counts)


def record_all(pruning: Pruning, packed: PackedImages) -> None:
    """Record a call of which the language model drops nothing."""
    plan, reports = pruning.drop_plan, packed.reports
    if plan is not None:
        reports = in_all_layers(reports, [stage.layer for stage in plan.stages], plan.depth)
    pruning.record(reports)


def no_labels(pruning: Pruning) -> DecodingError:
    """The error for labels, which fit no logits of a prompt that lost tokens on its way."""
    name = "" if pruning.inside is None else pruning.inside.name
    return DecodingError(
        f"{name} drops tokens inside the language model, and labels came with the images: train "
        "and measure losses without it, or prune the vision tower alone"
    )


def expect(
    pruning: Pruning,
    packed: PackedImages,
    rows: Rows,
    embeds: Tensor,
    visual: Tensor,
    valid: Tensor,
) -> None:
    """Let the language model drop tokens of these embeddings, and record it when it has.

    Parameters
    ----------
    rows : Rows
        the images of each row
    embeds : Tensor
        (B, n, D), padded on the left
    visual : Tensor
        (B, n) bool, tokens of images, newlines included
    valid : Tensor
        (B, n) bool, all but padding
    """
    hooks, plan = pruning.hooks, pruning.drop_plan
    assert hooks is not None
    assert plan is not None
    behind = torch.where(visual.any(1), visual.flip(1).int().argmax(1), valid.sum(1))
    counted = torch.stack((valid.sum(1), visual.sum(1), behind)).tolist()
    lengths, counts, tails = (tuple(values) for values in counted)
    # LLaVA's own classes cut what is too long for the model at its end.
    sent = tuple(
        _shared([len(packed.features[image]) for image in row], count)
        for row, count in zip(rows, counts, strict=True)
    )

    def record(levels: list[Level]) -> None:
        stages = [stage.layer for stage in plan.stages]
        pruning.record(
            in_layers(packed.reports, packed.tokens, rows, sent, levels, stages, plan.depth)
        )

    hooks.expect(embeds, Prompt(visual, valid, lengths, sent, tails, record), plan)


def _shared(tokens: Sequence[int], room: int) -> tuple[int, ...]:
    """How many tokens of each image fit, the first first."""
    ends = [min(end, room) for end in itertools.accumulate(tokens)]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))
