"""A comparison as a plot."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llava_hvp.errors import OptionError
from llava_hvp.evaluation.compare import Cell, Comparison, Line
from llava_hvp.evaluation.rendering import OTHER_MODEL, PARTS
from llava_hvp.files import write_whole

# M. Okabe and K. Ito's colours, which colour-blind readers tell apart, and a marker with each.
STYLES = (
    *(("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D")),
    *(("#e69f00", "v"), ("#56b4e9", "P"), ("#000000", "X")),
)
DASHES: tuple[Literal["--", "-"], ...] = ("--", "-")  # of published and measured


def plot(found: Comparison, path: Path) -> None:
    """Each benchmark, and the average, against kept tokens: published and measured, as a PNG.

    A colour and a marker a method; the unpruned model is on the line of the table's own.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise OptionError("matplotlib is missing: pip install 'llava-hvp[plots]'") from error
    columns = found.table.columns
    panels = [(c.label, [line.cells[c.benchmark] for line in found.lines]) for c in columns]
    averages = [line.average for line in found.lines]
    if any(cell.published is not None or cell.measured is not None for cell in averages):
        panels.append(("average, % of unpruned", averages))
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 3 * rows + 0.5), layout="constrained")
    title = f"{found.table.title}: {found.table.model}"
    figure.suptitle(f"{title}\n{OTHER_MODEL} {found.other_model}" if found.other_model else title)
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    methods = dict(zip(_methods(found.lines), itertools.cycle(STYLES), strict=False))
    for axis, (title, cells) in zip(axes, panels, strict=False):
        _draw(axis, found.lines, cells, methods)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("visual tokens kept")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    marks = ("", OTHER_MODEL * (found.other_model is not None))
    kinds = [
        Line2D([], [], color="grey", linestyle=dash, label=name + mark)
        for (name, _), dash, mark in zip(PARTS, DASHES, marks, strict=False)
    ]
    named = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=method)
        for method, (colour, marker) in methods.items()
    ]
    figure.legend(handles=[*kinds, *named], loc="outside lower center", ncols=8, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(path, content.getvalue())


def _methods(lines: Sequence[Line]) -> list[str]:
    """Names, the table's own methods first."""
    ordered = sorted(lines, key=lambda line: bool(line.row.origin))
    return list(dict.fromkeys(line.row.method for line in ordered if line.row.method is not None))


def _draw(
    axis: Any, lines: Sequence[Line], cells: Sequence[Cell], methods: dict[str, tuple[str, str]]
) -> None:
    for method, (colour, marker) in methods.items():
        own = [
            (line, cell)
            for line, cell in zip(lines, cells, strict=True)
            if line.row.method == method or (line.row.is_unpruned and method == next(iter(methods)))
        ]
        for (_, part), dash in zip(PARTS, DASHES, strict=False):
            points = sorted(
                (kept, value)
                for line, cell in own
                if (kept := part(line.kept_tokens)) is not None
                and (value := part(cell)) is not None
            )
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=5,
            )
