"""What a method inside the language model leaves of an image, stage by stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llava_hvp.methods.base import Selection
from llava_hvp.show.colours import UNPRUNED
from llava_hvp.show.frame import Report


def stages_of(report: Report) -> list[tuple[str, Report]]:
    """After which layer, in words, and the report of what is left then; nothing without stages."""
    whole: Any = report
    roles = report.selection.roles
    if list(roles) == [UNPRUNED]:  # at the tower; of what is dropped later the rest is kept
        roles = {"kept": roles[UNPRUNED]}
    return [
        (
            f"after layer {layer}",
            replace(
                whole,
                selection=Selection.from_roles(roles, mix=report.selection.mix),
                sent=mask,
                kept_tokens=report.layer_tokens[layer],
                layer_tokens=(),
                stages=(),
                stage_layers=(),
            ),
        )
        for layer, mask in zip(report.stage_layers, report.stages, strict=True)
    ]


def last_of(report: Report) -> Report:
    """What is left after the last stage, or at the tower where there is none."""
    stages = stages_of(report)
    return stages[-1][1] if stages else report


def shown_of(report: Report) -> list[tuple[str, Report]]:
    """What pictures show of a report: what was sent, where that is not all, and every stage."""
    stages = stages_of(report)
    is_all = report.kept_tokens == report.stock_tokens
    return stages if stages and is_all else [("sent", report), *stages]


def totals(report: Report) -> str:
    """As `281 of 576 tokens (48.8%)`, with `, 300 of 720 patches (41.7%)` where these are others.

    Inside the language model `168.0 of 576 tokens on average over 32 layers (29.2%)`.
    """
    patches = (
        f"{report.kept_patches} of {report.sent.numel()} patches ({report.kept_of_patches:.1%})"
    )
    if not report.stages:
        tokens = (
            f"{report.kept_tokens} of {report.stock_tokens} tokens ({report.kept_of_stock:.1%})"
        )
        same = report.kept_tokens, report.stock_tokens
        return (
            tokens if same == (report.kept_patches, report.sent.numel()) else f"{tokens}, {patches}"
        )
    return (
        f"{report.average_tokens:.1f} of {report.stock_tokens} tokens on average over "
        f"{len(report.layer_tokens)} layers ({report.average_tokens / report.stock_tokens:.1%}), "
        f"{report.kept_tokens} tokens sent, {patches}"
    )


def caption(words: str, report: Report) -> str:
    """As `after layer 2: 166 tokens, 160 patches`."""
    return f"{words}: {report.kept_tokens} tokens, {report.kept_patches} patches"
