"""Published tables: the figures of the papers, as data files with their source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from llava_hvp.errors import OptionError
from llava_hvp.evaluation.protocol import Protocol, counted
from llava_hvp.runtime import PruningConfig

_FOLDER = files("llava_hvp.evaluation") / "tables"
TABLES = ("hivtp-1", "hivtp-2", "hivtp-3", "hiprune-1", "fastervlm-1.5", "fastervlm-next", "eadp-1")


@dataclass(frozen=True)
class Column:
    """A benchmark of a table, and the harness that its figures came from.

    Parameters
    ----------
    metric : str
        of that harness; several joined by + are added
    task : str | None
        lmms-eval's name; None for LLaVA's scripts
    percent : bool
        the harness gives a fraction, the paper percent
    flags : tuple[str, ...]
        for `llava-hvp eval`
    """

    benchmark: str
    label: str
    harness: str
    metric: str
    task: str | None = None
    percent: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One setting; figures that cannot be read in the paper are not among the values.

    Parameters
    ----------
    method : str | None
        its name; None for unpruned LLaVA
    pruning : PruningConfig | None
        None for unpruned LLaVA, and where the source does not say what its token counts count
    average : float | None
        percent of unpruned, as the paper prints it
    origin : str
        of a row of a prior method, which is not that method's own measurement: who made it; "" for
        the paper's own rows
    remark : str
        what a reader has to know to compare with it
    """

    label: str
    method: str | None
    pruning: PruningConfig | None
    values: dict[str, float]
    kept_tokens: float | None = None
    kept_of_patches: float | None = None
    ttft_ms: float | None = None
    tokens_per_second: float | None = None
    average: float | None = None
    origin: str = ""
    remark: str = ""

    @property
    def is_unpruned(self) -> bool:
        """Whether this is LLaVA as it is."""
        return self.method is None

    @property
    def can_run(self) -> bool:
        """Whether there is a command for it: LLaVA as it is, or a setting that is known."""
        return self.is_unpruned or self.pruning is not None


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Parameters
    ----------
    checkpoint : str
        that its model was
    protocol : Protocol
        of its figures, as far as the source states it
    harness_stated : bool
        whether the source says which harness its figures came from; else the columns' is the likely
    as_released : dict[str, Any]
        options by which the released code departs from the paper's rule
    """

    name: str
    title: str
    source: str
    model: str
    checkpoint: str
    protocol: Protocol
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    harness_stated: bool = True
    as_released: dict[str, Any] = field(default_factory=dict)

    def released(self, *, beside: bool) -> Table:
        """The table with rows as the released code prunes, of the same published figures.

        Parameters
        ----------
        beside : bool
            each after the paper's own, else instead of it

        Rows of prior methods stay as they are. Raises OptionError for a table that has none.
        """
        if not self.as_released:
            have = [name for name in TABLES if get_table(name).as_released]
            raise OptionError(f"{self.name} has no rows as released: {', '.join(have)} have")
        rows: list[Row] = []
        for row in self.rows:
            is_own = row.pruning is not None and not row.origin
            if beside or not is_own:
                rows.append(row)
            if row.pruning is not None and is_own:
                pruning = PruningConfig.of(
                    row.pruning.spec, **row.pruning.options | self.as_released
                )
                rows.append(replace(row, label=f"{row.label}, as released", pruning=pruning))
        given = ", ".join(f"{name}={value}" for name, value in self.as_released.items())
        return replace(self, rows=tuple(rows), notes=(*self.notes, f"as released: {given}"))

    @property
    def unpruned(self) -> Row | None:
        """The row of LLaVA as it is, where the table has one."""
        return next((row for row in self.rows if row.is_unpruned), None)

    @property
    def own(self) -> tuple[Row, ...]:
        """The rows of LLaVA and of the paper's own method."""
        return tuple(row for row in self.rows if not row.origin)


def get_table(name: str) -> Table:
    """Raises OptionError, which names those that there are."""
    if name not in TABLES:
        raise OptionError(f"unknown table {name!r}: give one of {', '.join(TABLES)}")
    content: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    columns = tuple(
        Column(**{**each, "flags": tuple(each.get("flags", ()))}) for each in content["columns"]
    )
    read = {
        "protocol": Protocol(**content["protocol"], mme=_mme(columns)),
        "notes": tuple(content["notes"]),
        "columns": columns,
        "rows": tuple(_row(each) for each in content["rows"]),
        "as_released": _options(content.get("as_released")),
    }
    return Table(**{**content, **read})


def _mme(columns: Sequence[Column]) -> str | None:
    """How a table counts MME, which its column says."""
    return next((counted(c.benchmark, c.metric) for c in columns if c.benchmark == "mme"), None)


def _row(content: dict[str, Any]) -> Row:
    rest = dict(content)
    options = rest.pop("options")
    pruning = None if options is None else PruningConfig.of(rest["method"], **_options(options))
    return Row(pruning=pruning, **rest)


def _options(content: dict[str, Any] | None) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (content or {}).items()}


def with_stock_attention(pruning: PruningConfig | None) -> PruningConfig | None:
    """The method in a tower that keeps its own attention, as the released codes prune.

    In half precision another attention rounds otherwise, and moves choices between patches. Where
    every patch stays, the tower has its own anyway.
    """
    if pruning is None or not pruning.prunes:
        return pruning
    return replace(pruning, runtime=replace(pruning.runtime, tower_attention="stock"))


def has_stock_attention(pruning: PruningConfig | None) -> bool:
    """Whether the tower keeps its own attention."""
    return pruning == with_stock_attention(pruning)


def average(values: dict[str, float], unpruned: dict[str, float]) -> float | None:
    """HiPrune's average: mean over the benchmarks of pruned / unpruned, in percent."""
    shared = [name for name in values if unpruned.get(name)]
    if not shared:
        return None
    return 100 * sum(values[name] / unpruned[name] for name in shared) / len(shared)
