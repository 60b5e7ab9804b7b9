"""Rows as tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llava_hvp.bench.measure import Spread
from llava_hvp.bench.results import BenchRow, hosts_of, losses, losses_to_floor
from llava_hvp.tables import MARKDOWN, aligned

Cell = tuple[str, str]  # heading, text; "x none" stands right of what it is the ratio of

EXPLAINED = (
    "`kept`: visual tokens of an image, inside the language model averaged over its layers. "
    "`x none`: ratio to unpruned LLaVA on the same host, `x floor`: to the same patches kept "
    "without capture or choice (for a method inside the language model as many as its average, "
    "drawn at random at the tower), each in the same round (medians, TTFT with quartiles). Times "
    "below 1 and speeds above 1 are a gain. Encode includes the selection; launch is the share of "
    "the prefill during which the host was still launching."
)


def render(about: dict[str, Any], rows: Sequence[BenchRow], style: str) -> str:
    """Answers, phases, memory, FLOPs, where pruning loses; the command and machine first."""
    code = "    " if style == MARKDOWN else ""
    parts = [f"{code}{about['command']}", f"{about['machine']}; {about['versions']}."]
    parts += [about["model"], EXPLAINED]
    for batch in dict.fromkeys(row.batch for row in rows):
        group = [row for row in rows if row.batch == batch]
        stock, tiles = group[0].stock_tokens, group[0].tiles // batch
        what = f"Batch {batch}: {stock:.0f} visual tokens, {tiles} tile{'s' * (tiles > 1)} an image"
        parts.append(f"## {what}" if style == MARKDOWN else what)
        nones: dict[str, BenchRow] = {}
        for row in group:
            nones.setdefault(row.host, row)
        for columns in (_answer, _phases, _memory, lambda row, n=nones: _flops(row, n[row.host])):
            parts.append(_tabulate(group, columns, style))
    lost = losses(rows)
    listed = "".join(f"\n- {line}" for line in lost)
    parts.append(f"Where pruning loses, x none:\n{listed}" if lost else "Pruning loses nowhere.")
    slower = "".join(f"\n- {line}" for line in losses_to_floor(rows))
    if slower:
        parts.append(f"Slower than `random` at the tower with the same average:\n{slower}")
    return "\n\n".join(parts) + "\n"


def _answer(row: BenchRow) -> list[Cell]:
    return [
        ("TTFT ms", _milliseconds(row.seconds["ttft"])),
        ("x none", _quartiles(row.to_none["ttft"])),
        ("x floor", _ratio(row.to_floor.get("ttft"))),
        ("answer tok/s", _speed(row, "answer")),
        ("x none", _ratio(row.to_none["answer"])),
    ]


def _phases(row: BenchRow) -> list[Cell]:
    return [
        ("encode ms", _milliseconds(row.seconds["encode"])),
        ("x none", _ratio(row.to_none["encode"])),
        ("selection ms", "" if row.selection is None else _milliseconds(row.selection)),
        ("of floor TTFT", _percent(row.selection_of_floor_ttft)),
        ("prefill ms", _milliseconds(row.seconds["prefill"])),
        ("x none", _ratio(row.to_none["prefill"])),
        ("launch", f"{row.launch_share:.0%}"),
        ("decode tok/s", _speed(row, "decode")),
        ("x none", _ratio(row.to_none.get("decode"))),
    ]


def _memory(row: BenchRow) -> list[Cell]:
    peak, ratio = row.peak_bytes, row.peak_to_none
    return [
        ("encode MB a tile", f"{peak['encode'] / row.tiles / 1e6:.1f}"),
        ("x none", f"{ratio['encode']:.3f}"),
        ("prefill MB", f"{peak['prefill'] / 1e6:.1f}"),
        ("x none", f"{ratio['prefill']:.3f}"),
        ("answer MB", f"{peak['answer'] / 1e6:.1f}"),
        ("x none", f"{ratio['answer']:.3f}"),
    ]


def _flops(row: BenchRow, none: BenchRow) -> list[Cell]:
    flops = row.flops
    cells = [
        ("tower GFLOP", f"{flops.tower / 1e9:.1f}"),
        ("selection", f"{flops.selection / 1e9:.2f}"),
        ("projector", f"{flops.projector / 1e9:.1f}"),
        ("prefill", f"{flops.prefill / 1e9:.1f}"),
        ("decode", f"{flops.decode / 1e9:.1f}"),
        ("to first token, x none", f"{flops.to_first_token / none.flops.to_first_token:.3f}"),
    ]
    if row.flops_published is not None:
        cells.append(("as published", f"{row.flops_published / 1e9:.1f}"))
    return cells


def _tabulate(
    rows: Sequence[BenchRow], columns: Callable[[BenchRow], list[Cell]], style: str
) -> str:
    lines = [
        [
            ("method", row.method),
            *([("host", row.host)] if len(hosts_of(rows)) > 1 else []),
            ("options", row.options),
            ("kept", f"{row.average_tokens:.0f}"),
            *columns(row),
        ]
        for row in rows
    ]
    headings = [heading for heading, _ in lines[0]]
    return aligned(headings, [[cell for _, cell in line] for line in lines], style)


def _milliseconds(spread: Spread) -> str:
    value = spread.median * 1e3
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f}"


def _quartiles(spread: Spread) -> str:
    if spread.low == spread.high:
        return f"{spread.median:.3f}"
    return f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"


def _percent(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.1%}"


def _speed(row: BenchRow, name: str) -> str:
    spread = row.tokens_per_second.get(name)
    return "" if spread is None else f"{spread.median:.1f}"
