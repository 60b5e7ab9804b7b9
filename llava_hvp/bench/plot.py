"""TTFT and tokens/s against kept tokens."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, BinaryIO

from llava_hvp.bench.results import BenchRow, hosts_of


def title_of(about: dict[str, str]) -> str:
    """What a plot shows, and where; versions and settings of the machine are in the table."""
    machine = [part for part in about["machine"].split(", ") if "=" not in part]
    return f"{about['model']} {', '.join(machine)}"


def plot(title: str, rows: Sequence[BenchRow], file: BinaryIO) -> None:
    """Write `figure_of` as a PNG."""
    figure_of(title, rows).savefig(file, format="png", dpi=110)


def figure_of(title: str, rows: Sequence[BenchRow]) -> Any:
    """A row of panels for each batch, both as ratios to unpruned LLaVA, on one scale a column."""
    from matplotlib.figure import Figure

    from llava_hvp.evaluation.plot import STYLES

    batches = list(dict.fromkeys(row.batch for row in rows))
    figure = Figure(figsize=(10, 3.6 * len(batches)), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize="medium")
    axes = figure.subplots(len(batches), 2, squeeze=False, sharey="col")
    for line, batch in zip(axes, batches, strict=True):
        group = [row for row in rows if row.batch == batch]
        hosts = hosts_of(group)
        none, pruned = group[0], group[len(hosts) :]
        for axis, phase, what in zip(
            line, ("ttft", "answer"), ("time to first token", "tokens/s of the answer"), strict=True
        ):
            axis.axhline(1, color="grey", linewidth=1, label="unpruned LLaVA")
            lines = dict.fromkeys((row.method, row.host) for row in pruned)
            styles = itertools.cycle(STYLES)
            for (name, host), (colour, marker) in zip(lines, styles, strict=False):
                found = sorted(
                    (row for row in pruned if (row.method, row.host) == (name, host)),
                    key=lambda r: r.average_tokens,
                )
                middle = [row.to_none[phase].median for row in found]
                axis.errorbar(
                    [row.average_tokens for row in found],
                    middle,
                    yerr=[
                        [row.to_none[phase].median - row.to_none[phase].low for row in found],
                        [row.to_none[phase].high - row.to_none[phase].median for row in found],
                    ],
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=f"{name}, {host}" if len(hosts) > 1 else name,
                )
            axis.set_xlabel(f"visual tokens kept of {none.stock_tokens:.0f}")
            axis.set_ylabel("ratio to unpruned LLaVA")
            axis.set_title(f"{what}, batch {batch}", fontsize="medium")
            axis.set_xlim(0, 1.05 * none.stock_tokens)
            axis.set_ylim(0, 1.1 * max(1, axis.get_ylim()[1]))
            axis.grid(alpha=0.3)
        line[0].legend(fontsize="small")
    return figure
