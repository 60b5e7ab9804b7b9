"""Results in words, as tables and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import BENCHMARKS
from llava_hvp.evaluation.compare import Cell, Comparison, Line
from llava_hvp.evaluation.measured import Measured
from llava_hvp.evaluation.settings import UNPRUNED
from llava_hvp.files import write_whole
from llava_hvp.tables import MARKDOWN, TERMINAL, text_table

STYLES = {"terminal": TERMINAL, "markdown": MARKDOWN}
FORMATS = (*STYLES, "csv")
Part = tuple[str, Callable[[Cell], float | None]]
OTHER_MODEL = "*"  # marks figures of another model than the table's
PARTS: tuple[Part, ...] = (
    ("published", lambda cell: cell.published),
    ("measured", lambda cell: cell.measured),
    ("difference", lambda cell: cell.difference),
)


def one_line(result: dict[str, Any]) -> str:
    """As `POPE f1: 85.90 (hivtp --r-max 0.5, 282 tokens kept, first token after 92 ms)`."""
    name = result["benchmark"]
    title = BENCHMARKS[name].title if name in BENCHMARKS else name
    value = result["value"]
    shown = f"{value:.2f}" if value is not None else f"to be uploaded: {result['upload']}"
    given = " ".join(result["given"]).removeprefix("--prune-method ") or result["method"]
    facts = [given]
    if result["kept_tokens"] is not None:
        facts.append(f"{_tokens(result)} of {result['stock_tokens']:.0f} tokens kept")
    if result["ttft_ms"] is not None:
        facts.append(f"first token after {result['ttft_ms']:.0f} ms")
    if result["tokens_per_second"] is not None:
        facts.append(f"{result['tokens_per_second']:.1f} tokens/s")
    if result["vision_tower_dtype"]:
        dtype, attention = result["vision_tower_dtype"], result["vision_tower_attention"]
        facts.append(f"vision tower in {dtype} with {attention} attention")
    return f"{title} {result['metric']}: {shown} ({', '.join(facts)})"


def _tokens(result: dict[str, Any]) -> str:
    """Those that are sent, and what of them enters a layer where some are dropped inside."""
    sent, average = result["kept_tokens"], result["average_tokens"]
    return f"{sent:.0f}" if sent == average else f"on average over layers {average:.1f}"


def listing(results: Sequence[Measured], form: str) -> str:
    """A line for each result of a folder."""
    table = [
        {
            "model": r.model,
            "method": UNPRUNED if r.pruning is None else str(r.pruning),
            "benchmark": f"{r.benchmark} {r.variant}".strip(),
            "harness": r.harness,
            "metric": r.metric,
            "value": _text(r.metrics.get(r.metric), 4),
            "tokens": _text(r.kept_tokens, 1),
            "of stock": _text(r.kept_of_stock, 3),
            "of patches": _text(r.kept_of_patches, 3),
            "TTFT ms": _text(r.ttft_ms, 1),
            "tokens/s": _text(r.tokens_per_second, 2),
            "vision tower": r.tower,
        }
        for r in results
    ]
    return _render(table, form)


def comparison(found: Comparison, form: str) -> str:
    """Three lines for each setting: published, measured and the difference."""
    columns = found.table.columns
    if form == "csv":
        return _long(found)
    table = []
    mark, parts_of_line = (OTHER_MODEL, PARTS[:-1]) if found.other_model else ("", PARTS)
    for line in found.lines:
        for name, part in parts_of_line:
            shown = name + mark * (name == "measured")
            cells = {"setting": line.label if name == "published" else "", "": shown}
            cells["tokens"] = _text(part(line.kept_tokens), 0)
            cells |= {c.label: _text(part(line.cells[c.benchmark]), 2) for c in columns}
            cells["average %"] = _text(part(line.average), 1)
            if name == "measured" and 0 < line.averaged < len(columns):
                cells["average %"] += f" of {line.averaged}"
            cells["TTFT ms"] = _text(part(line.ttft_ms), 0)
            cells["tokens/s"] = _text(part(line.tokens_per_second), 2)
            table.append(cells)
    paper = found.table
    harnesses = "; ".join(
        f"{h}: {', '.join(c.label for c in columns if c.harness == h)}"
        for h in dict.fromkeys(c.harness for c in columns)
    )
    measured = f"measured here with {found.model}" if found.model else "nothing measured yet"
    parts = [
        f"{paper.title}: {paper.model} ({paper.source}), beside what was {measured}."
        if found.model
        else f"{paper.title}: {paper.model} ({paper.source}); {measured}.",
        _render(table, form),
        f"Published figures come from {harnesses}. Average: mean of pruned / unpruned over the "
        "benchmarks, as HiPrune has it.",
        *(f"{note[0].upper()}{note[1:]}." for note in paper.notes),
    ]
    if found.other_model:
        parts.append(f"{OTHER_MODEL} {found.other_model}.")
    if found.other_harness:
        parts.append(
            f"Measured through another harness than published, so not comparable to the last "
            f"digit: {', '.join(found.other_harness)}."
        )
    if found.towers:
        parts.append(f"Vision tower in what was measured: {'; '.join(found.towers)} attention.")
    if found.fused:
        parts.append(
            "Measured with tower_attention=sdpa, which rounds otherwise than eager attention and "
            f"keeps other patches in half precision: {', '.join(found.fused)}."
        )
    if found.unused:
        names = sorted({f"{r.benchmark} ({_method(r)}, {r.harness})" for r in found.unused})
        parts.append(f"Measured, but in no figure of this table: {', '.join(names)}.")
    return "\n\n".join(parts)


def _method(result: Measured) -> str:
    return UNPRUNED if result.pruning is None else str(result.pruning)


def _long(found: Comparison) -> str:
    """One line a figure, for other programs."""
    table = []
    for line in found.lines:
        named = [
            (c.label, c.harness, c.metric, line.cells[c.benchmark]) for c in found.table.columns
        ]
        named += [(name, "", "", cell) for name, cell in _others(line).items()]
        for label, harness, metric, cell in named:
            table.append(
                {
                    "table": found.table.name,
                    "setting": line.label,
                    "figure": label,
                    "metric": metric,
                    "published": cell.published,
                    "published_harness": harness,
                    "measured": cell.measured,
                    "measured_harness": cell.harness,
                    "difference": cell.difference,
                    "published_model": model_name(found.table.checkpoint),
                    "measured_model": found.model,
                }
            )
    return _csv(table)


def _others(line: Line) -> dict[str, Cell]:
    return {
        "kept tokens": line.kept_tokens,
        "kept of patches": line.kept_of_patches,
        "average %": line.average,
        "TTFT ms": line.ttft_ms,
        "tokens/s": line.tokens_per_second,
    }


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _render(table: list[dict[str, str]], form: str) -> str:
    if form == "csv":
        return _csv(table)
    return text_table(table, STYLES[form])


def _csv(table: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().rstrip("\n")


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
