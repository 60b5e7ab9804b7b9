"""A comparison as a plot."""

from __future__ import annotations

import io
from pathlib import Path

from llava_hvp.errors import OptionError
from llava_hvp.evaluation.compare import Comparison
from llava_hvp.evaluation.rendering import OTHER_MODEL, PARTS
from llava_hvp.files import write_whole


def plot(found: Comparison, path: Path) -> None:
    """Each benchmark, and the average, against kept tokens: published and measured, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("matplotlib is missing: pip install 'llava-hvp[plots]'") from error
    panels = [
        (c.label, [line.cells[c.benchmark] for line in found.lines]) for c in found.table.columns
    ]
    averages = [line.average for line in found.lines]
    if any(cell.published is not None or cell.measured is not None for cell in averages):
        panels.append(("average, % of unpruned", averages))
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 3 * rows), layout="constrained")
    title = f"{found.table.title}: {found.table.model}"
    figure.suptitle(f"{title}\n{OTHER_MODEL} {found.other_model}" if found.other_model else title)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for axis, (title, cells) in zip(axes, panels, strict=False):
        for (name, part), style in zip(PARTS, ("o--", "s-"), strict=False):
            points = [
                (kept, value)
                for line, cell in zip(found.lines, cells, strict=True)
                if (kept := part(line.kept_tokens)) is not None
                and (value := part(cell)) is not None
            ]
            points.sort()
            mark = OTHER_MODEL * (name == "measured" and found.other_model is not None)
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=name + mark)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("visual tokens kept")
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    figure.axes[0].legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(path, content.getvalue())
