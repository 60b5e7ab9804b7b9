"""Measured beside published, point by point."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.evaluation.measured import Measured, find
from llava_hvp.evaluation.protocol import Protocol
from llava_hvp.evaluation.published import Column, Row, Table, average, has_stock_attention
from llava_hvp.runtime import PruningConfig


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Parameters
    ----------
    harness : str
        that measured; "" where nothing was
    alike : bool
        whether both are of one model
    """

    published: float | None
    measured: float | None
    harness: str = ""
    alike: bool = True

    @property
    def difference(self) -> float | None:
        """Measured less published; None of two models."""
        if self.published is None or self.measured is None or not self.alike:
            return None
        return self.measured - self.published


@dataclass(frozen=True)
class Line:
    """One setting of a table.

    Parameters
    ----------
    cells : dict[str, Cell]
        by benchmark
    average : Cell
        percent of unpruned, over the benchmarks that both have
    protocols : tuple[Protocol, ...]
        of what was measured; of one table's MME both are counted alike
    averaged, published_averaged : int
        how many benchmarks the measured and the published average are of
    """

    row: Row
    cells: dict[str, Cell]
    kept_tokens: Cell
    kept_of_patches: Cell
    ttft_ms: Cell
    tokens_per_second: Cell
    average: Cell
    protocols: tuple[Protocol, ...]
    averaged: int
    published_averaged: int

    def unlike(self, published: Protocol) -> list[str]:
        """In what some of the measured figures are known to be unlike the published ones."""
        return list(dict.fromkeys(n for p in self.protocols for n in published.unlike(p)))

    @property
    def is_measured(self) -> bool:
        """Whether any figure of the row was measured."""
        return any(cell.measured is not None for cell in self.cells.values())


@dataclass(frozen=True)
class Comparison:
    """A published table with what was measured here.

    Parameters
    ----------
    other_harness : list[str]
        benchmarks measured through another harness than the published figure
    unused : list[Measured]
        results that belong to no figure of the table
    fused : list[str]
        benchmarks measured with pruning's fused attention
    """

    table: Table
    model: str
    lines: list[Line]
    other_harness: list[str]
    unused: list[Measured]
    fused: list[str]

    @property
    def other_model(self) -> str | None:
        """Why there are no differences, in a sentence; None where they are of one model."""
        if not self.model or is_model_of(self.table, self.model):
            return None
        return (
            f"Measured with {self.model}, which is not {model_name(self.table.checkpoint)} by its "
            "name: these are figures of two models, so there are no differences"
        )


def is_model_of(table: Table, model: str) -> bool:
    """Whether a result is of the published table's model, by its name."""
    return model.lower() == model_name(table.checkpoint).lower()


def compare(table: Table, results: Sequence[Measured]) -> Comparison:
    """Set results beside a table; figures that were not measured stay empty."""
    model = results[0].model if results else ""
    cell = functools.partial(Cell, alike=is_model_of(table, model))
    used: list[Measured] = []
    base_row = table.unpruned
    base = _values(_found(results, table, None))
    lines = []
    for row in table.rows:
        here = _found(results, table, row.pruning) if row.can_run else {}
        used += [result for result, _ in here.values()]
        values = _values(here)
        own = average(values, base)
        published = row.average
        if published is None and base_row is not None:
            published = average(row.values, base_row.values)
        lines.append(
            Line(
                row,
                {c.benchmark: cell(*_figures(row, c, here)) for c in table.columns},
                cell(row.kept_tokens, _mean(used_of(here), "kept_tokens")),
                cell(row.kept_of_patches, _mean(used_of(here), "kept_of_patches")),
                cell(row.ttft_ms, _mean(used_of(here), "ttft_ms")),
                cell(row.tokens_per_second, _mean(used_of(here), "tokens_per_second")),
                cell(published, own),
                _protocols(used_of(here), table),
                0 if own is None else sum(bool(base.get(name)) for name in values),
                0 if published is None else len(row.values),
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
        model,
        lines,
        other,
        unused,
        sorted({r.benchmark for r in used if not has_stock_attention(r.pruning)}),
    )


Found = dict[str, tuple[Measured, float]]  # by benchmark


def used_of(here: Found) -> list[Measured]:
    """The results of a line."""
    return [result for result, _ in here.values()]


def _found(results: Sequence[Measured], table: Table, pruning: PruningConfig | None) -> Found:
    found = {c.benchmark: find(results, c, pruning) for c in table.columns}
    return {name: each for name, each in found.items() if each is not None}


def _values(here: Found) -> dict[str, float]:
    return {name: value for name, (_, value) in here.items()}


def _protocols(results: Sequence[Measured], table: Table) -> tuple[Protocol, ...]:
    found = (replace(result.protocol, mme=table.protocol.mme) for result in results)
    return tuple(dict.fromkeys(found))


def _figures(row: Row, column: Column, here: Found) -> tuple[float | None, float | None, str]:
    """Published, measured, and the harness that measured."""
    result, value = here.get(column.benchmark, (None, None))
    return row.values.get(column.benchmark), value, "" if result is None else result.harness


def _mean(results: Sequence[Measured], name: str) -> float | None:
    """Over the benchmarks, as HIVTP averages."""
    values = [value for r in results if (value := getattr(r, name)) is not None]
    return mean(values) if values else None
