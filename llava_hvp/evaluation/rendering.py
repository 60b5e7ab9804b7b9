"""Results in words, as tables and as a plot."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Callable, Sequence
from typing import Any

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.evaluation.benchmarks import BENCHMARKS
from llava_hvp.evaluation.compare import Cell, Comparison, Line
from llava_hvp.evaluation.measured import Measured
from llava_hvp.evaluation.protocol import Letters, Protocol, columns_of
from llava_hvp.evaluation.published import Column, Table
from llava_hvp.evaluation.settings import UNPRUNED
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
    letters = Letters()
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
            **(columns_of(r.protocol) if form == "csv" else {"protocol": letters.of([r.protocol])}),
        }
        for r in results
    ]
    rendered = _render(table, form)
    return rendered if form == "csv" else f"{rendered}\n\n{letters.legend()}"


def comparison(found: Comparison, form: str) -> str:
    """A line for each setting as published; where it was measured, that and the difference."""
    if form == "csv":
        return _long(found)
    paper, columns = found.table, found.table.columns
    notes, letters = _prior_notes(paper), Letters()
    mark, parts_of_line = (OTHER_MODEL, PARTS[:-1]) if found.other_model else ("", PARTS)
    table = []
    for line in found.lines:
        letter = notes.get((line.row.origin, line.row.remark))
        label = f"{line.row.label} [{letter[0]}]" if letter else line.row.label
        for name, part in parts_of_line if line.is_measured else PARTS[:1]:
            shown = name + mark * (name == "measured")
            cells = {"setting": label if name == "published" else "", "": shown}
            cells["protocol"] = _protocol(line, name, paper.protocol, letters)
            table.append(cells | _figures_of(line, part, columns, of=_averaged(line, name)))
    parts = [
        f"{paper.title}: {paper.model} ({paper.source}), beside what was measured here with "
        f"{found.model}."
        if found.model
        else f"{paper.title}: {paper.model} ({paper.source}); nothing measured yet.",
        _render(table, form),
        letters.legend(),
        *_footnotes(found, list(notes.values())),
    ]
    return "\n\n".join(parts)


def _figures_of(
    line: Line, part: Callable[[Cell], float | None], columns: Sequence[Column], *, of: int
) -> dict[str, str]:
    """The cells of one line; the average says of how many benchmarks it is, if not of all."""
    cells = {"tokens": _text(part(line.kept_tokens), 0)}
    cells |= {c.label: _text(part(line.cells[c.benchmark]), 2) for c in columns}
    cells["average %"] = _text(part(line.average), 1)
    if cells["average %"] and 0 < of < len(columns):
        cells["average %"] += f" of {of}"
    cells["TTFT ms"] = _text(part(line.ttft_ms), 0)
    cells["tokens/s"] = _text(part(line.tokens_per_second), 2)
    return cells


def _protocol(line: Line, name: str, published: Protocol, letters: Letters) -> str:
    """Letters of the protocols; for a difference, in what they are unlike."""
    if name == "difference":
        unlike = line.unlike(published)
        return f"unlike {', '.join(unlike)}" if unlike else ""
    return letters.of([published] if name == "published" else line.protocols)


def _averaged(line: Line, name: str) -> int:
    return {"published": line.published_averaged, "measured": line.averaged}.get(name, 0)


def _prior_notes(table: Table) -> dict[tuple[str, str], tuple[str, str]]:
    """(origin, remark) of rows of prior methods -> a letter, and the note that it stands for."""
    labels: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        if row.origin:
            labels.setdefault((row.origin, row.remark), []).append(row.label.split(" ")[0])
    notes = {}
    for letter, (key, names) in zip(string.ascii_lowercase, labels.items(), strict=False):
        listed = ", ".join(dict.fromkeys(names))
        notes[key] = letter, f"[{letter}] {listed}: {'; '.join(filter(None, key))}."
    return notes


def _footnotes(found: Comparison, prior: Sequence[tuple[str, str]]) -> list[str]:
    """What a reader has to know, a paragraph each."""
    paper, columns = found.table, found.table.columns
    harnesses = "; ".join(
        f"{h}: {', '.join(c.label for c in columns if c.harness == h)}"
        for h in dict.fromkeys(c.harness for c in columns)
    )
    head = (
        f"Prior methods as {paper.title} has them, which need not be what their own papers "
        "measured:"
    )
    parts = ["\n".join([head, *(note for _, note in prior)])] if prior else []
    come = "come from" if paper.harness_stated else "are by a harness not stated, likely"
    parts += [
        f"Published figures {come} {harnesses}. Average: mean of pruned / unpruned over the "
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
    if found.fused:
        parts.append(
            "Measured with tower_attention=sdpa, which rounds otherwise than eager attention and "
            f"keeps other patches in half precision: {', '.join(found.fused)}."
        )
    if found.unused:
        names = sorted({f"{r.benchmark} ({_method(r)}, {r.harness})" for r in found.unused})
        parts.append(f"Measured, but in no figure of this table: {', '.join(names)}.")
    return parts


def _method(result: Measured) -> str:
    return UNPRUNED if result.pruning is None else str(result.pruning)


def _long(found: Comparison) -> str:
    """One line a figure, for other programs."""
    paper, table = found.table, []
    for line in found.lines:
        named = [(c.label, c.harness, c.metric, line.cells[c.benchmark]) for c in paper.columns]
        named += [(name, "", "", cell) for name, cell in _others(line).items()]
        for label, harness, metric, cell in named:
            table.append(
                {
                    "table": paper.name,
                    "setting": line.row.label,
                    "figure": label,
                    "metric": metric,
                    "published": cell.published,
                    "published_harness": harness,
                    "measured": cell.measured,
                    "measured_harness": cell.harness,
                    "difference": cell.difference,
                    "published_model": model_name(paper.checkpoint),
                    "measured_model": found.model,
                    "published_protocol": str(paper.protocol),
                    "measured_protocol": " | ".join(map(str, line.protocols)),
                    "unlike": ", ".join(line.unlike(paper.protocol)),
                    "origin": line.row.origin or paper.title,
                    "remark": line.row.remark,
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
