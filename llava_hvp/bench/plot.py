"""TTFT and tokens/s against kept tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import BinaryIO

from llava_hvp.bench.results import BenchRow


def plot(title: str, rows: Sequence[BenchRow], file: BinaryIO) -> None:
    """Write a PNG: a row of panels for each batch, both as ratios to unpruned LLaVA."""
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row.batch for row in rows))
    figure = Figure(figsize=(10, 3.6 * len(batches)), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize="medium")
    axes = figure.subplots(len(batches), 2, squeeze=False)
    for line, batch in zip(axes, batches, strict=True):
        none, *pruned = [row for row in rows if row.batch == batch]
        for axis, phase, what in zip(
            line, ("ttft", "answer"), ("time to first token", "tokens/s of the answer"), strict=True
        ):
            axis.axhline(1, color="grey", linewidth=1, label="unpruned LLaVA")
            for name in dict.fromkeys(row.method for row in pruned):
                found = sorted(
                    (row for row in pruned if row.method == name), key=lambda r: r.average_tokens
                )
                middle = [row.to_none[phase].median for row in found]
                axis.errorbar(
                    [row.average_tokens for row in found],
                    middle,
                    yerr=[
                        [row.to_none[phase].median - row.to_none[phase].low for row in found],
                        [row.to_none[phase].high - row.to_none[phase].median for row in found],
                    ],
                    marker="o",
                    capsize=3,
                    label=name,
                )
            axis.set_xlabel(f"visual tokens kept of {none.stock_tokens:.0f}")
            axis.set_ylabel(f"{what} / unpruned")
            axis.set_title(f"batch {batch}", fontsize="medium")
            axis.set_xlim(0, 1.05 * none.stock_tokens)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        line[0].legend(fontsize="small")
    figure.savefig(file, format="png", dpi=110)
