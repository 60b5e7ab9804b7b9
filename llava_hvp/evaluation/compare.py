"""Measured beside published, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from llava_hvp.evaluation.measured import Measured, find
from llava_hvp.evaluation.published import Column, Row, Table, average, has_stock_attention


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    harness : that measured; "" where nothing was
    """

    published: float | None
    measured: float | None
    harness: str = ""

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        if self.published is None or self.measured is None:
            return None
        return self.measured - self.published


@dataclass(frozen=True)
class Line:
    """One setting of a table.

    cells : by benchmark
    average : percent of unpruned, over the benchmarks that both have
    averaged : how many benchmarks the measured average is of
    """

    label: str
    cells: dict[str, Cell]
    kept_tokens: Cell
    kept_of_patches: Cell
    ttft_ms: Cell
    tokens_per_second: Cell
    average: Cell
    averaged: int


@dataclass(frozen=True)
class Comparison:
    """A published table with what was measured here.

    other_harness : benchmarks measured through another harness than the published figure
    unused : results that belong to no figure of the table
    towers : how the vision tower ran in what was measured, as "float16 eager"
    fused : benchmarks measured with pruning's fused attention
    """

    table: Table
    model: str
    lines: list[Line]
    other_harness: list[str]
    unused: list[Measured]
    towers: list[str]
    fused: list[str]


def compare(table: Table, results: Sequence[Measured]) -> Comparison:
    """Set results beside a table; figures that were not measured stay empty."""
    used: list[Measured] = []
    base_row = table.unpruned
    base = _values(results, table, None)
    lines = []
    for row in table.rows:
        found = {c.benchmark: find(results, c, row.method) for c in table.columns}
        here = {name: each for name, each in found.items() if each is not None}
        used += [result for result, _ in here.values()]
        values = {name: value for name, (_, value) in here.items()}
        own = average(values, base)
        published = None if base_row is None else average(row.values, base_row.values)
        lines.append(
            Line(
                row.label,
                {c.benchmark: _cell(row, c, here) for c in table.columns},
                Cell(row.kept_tokens, _mean(used_of(here), "kept_tokens")),
                Cell(row.kept_of_patches, _mean(used_of(here), "kept_of_patches")),
                Cell(row.ttft_ms, _mean(used_of(here), "ttft_ms")),
                Cell(row.tokens_per_second, _mean(used_of(here), "tokens_per_second")),
                Cell(published, own),
                0 if own is None else sum(bool(base.get(name)) for name in values),
            )
        )
    other = [
        c.label
        for c in table.columns
        if any(line.cells[c.benchmark].harness not in ("", c.harness) for line in lines)
    ]
    taken = {id(result) for result in used}
    unused = [result for result in results if id(result) not in taken]
    return Comparison(
        table,
        results[0].model if results else "",
        lines,
        other,
        unused,
        sorted({result.tower for result in used if result.tower}),
        sorted({r.benchmark for r in used if not has_stock_attention(r.method)}),
    )


def used_of(here: dict[str, tuple[Measured, float]]) -> list[Measured]:
    """The results of a line."""
    return [result for result, _ in here.values()]


def _values(results: Sequence[Measured], table: Table, method: None) -> dict[str, float]:
    found = {c.benchmark: find(results, c, method) for c in table.columns}
    return {name: each[1] for name, each in found.items() if each is not None}


def _cell(row: Row, column: Column, here: dict[str, tuple[Measured, float]]) -> Cell:
    result, value = here.get(column.benchmark, (None, None))
    harness = "" if result is None else result.harness
    return Cell(row.values.get(column.benchmark), value, harness)


def _mean(results: Sequence[Measured], name: str) -> float | None:
    """Over the benchmarks, as HIVTP averages."""
    values = [value for r in results if (value := getattr(r, name)) is not None]
    return mean(values) if values else None
