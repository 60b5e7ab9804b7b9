"""Scores as tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO

from llava_hvp.accuracy.scores import VariantScore
from llava_hvp.tables import MARKDOWN, text_table

EXPLAINED = (
    "Percent of questions answered right, asked in the template {template}, greedily; `all` with "
    "the half width of its 95 % interval. `kept`: mean visual tokens of an image, `of patches`: "
    "kept patches / all patches (of a method inside the language model both are means over its "
    "layers), `time`: of all questions, from image to answer, as ratio to "
    "unpruned, taken in turns."
)
REFERENCES = ("random", "uniform")


def render(about: dict[str, Any], scores: Sequence[VariantScore], style: str) -> str:
    """The command and the machine, then a row for each variant."""
    code = "    " if style == MARKDOWN else ""
    tasks = list(scores[0].tasks)
    table = [
        {
            "method": score.method,
            "options": score.options,
            "kept": "" if score.kept_tokens is None else f"{score.kept_tokens:.1f}",
            "of patches": f"{score.kept_of_patches:.1%}",
            **{task: f"{score.tasks[task]:.1f}" for task in tasks},
            "all": f"{score.overall:.1f} ± {score.half_width:.1f}",
            "time": f"{score.time:.2f}",
        }
        for score in scores
    ]
    parts = [
        f"{code}{about['command']}",
        f"{about['machine']}; {about['versions']}.",
        about["model"],
        EXPLAINED.format(**about),
        text_table(table, style),
        *no_better(scores),
    ]
    return "\n\n".join(parts) + "\n"


def no_better(scores: Sequence[VariantScore]) -> list[str]:
    """Where a method is not above the better reference at its budget, by more than chance."""
    lines = []
    for score in scores:
        if score.method in ("none", *REFERENCES):
            continue
        beside = [s for s in scores if s.method in REFERENCES and s.options == score.options]
        best = max(beside, key=lambda s: s.overall, default=None)
        if best is None:
            continue
        noise = math.hypot(score.half_width, best.half_width)
        if score.overall - best.overall <= noise:
            word = "below" if best.overall - score.overall > noise else "no better than"
            lines.append(
                f"- {score.method} {score.options} ({score.overall:.1f}) is {word} "
                f"{best.method} ({best.overall:.1f})"
            )
    return ["Beside `random` and `uniform`:\n\n" + "\n".join(lines)] if lines else []


def plot(title: str, scores: Sequence[VariantScore], file: BinaryIO) -> None:
    """Accuracy of all tasks together, and of each, against kept patches."""
    import textwrap

    from matplotlib.figure import Figure

    none, *pruned = scores
    panels = ["all", *none.tasks]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 140)), fontsize="medium")
    axes = figure.subplots(2, -(-len(panels) // 2), sharex=True, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):

        def of(score: VariantScore, panel: str = panel) -> float:
            return score.overall if panel == "all" else score.tasks[panel]

        axis.axhline(of(none), color="grey", linewidth=1, label="unpruned")
        for name in dict.fromkeys(score.method for score in pruned):
            found = sorted((s for s in pruned if s.method == name), key=lambda s: s.kept_of_patches)
            axis.plot(
                [100 * s.kept_of_patches for s in found],
                [of(s) for s in found],
                marker="o",
                linestyle=":" if name in REFERENCES else "-",
                label=name,
            )
        axis.set_title(panel)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("% right")
    axes[0].legend(fontsize="small")
    figure.supxlabel("patches kept, %", fontsize="medium")
    figure.savefig(file, format="png", dpi=100)
