"""What `llava-hvp tune` prints and writes: tables, plots, and what was found for other commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llava_hvp.cli.arguments import write_results
from llava_hvp.console import say
from llava_hvp.errors import EvaluationError
from llava_hvp.runtime import PruningConfig
from llava_hvp.tables import MARKDOWN, TERMINAL
from llava_hvp.tune import agreement
from llava_hvp.tune.agreement import Curve
from llava_hvp.tune.tables import SHOWN, Found, best_of, plot, render
from llava_hvp.tune.verdict import Interval
from llava_hvp.tuned import write_tuned

ENDING = ".json"
KEPT = ("model", "explained", "command", "machine", "versions")  # of what is told of a run


@dataclass(frozen=True)
class Written:
    """Where what was found goes.

    Parameters
    ----------
    out : Path
        the file for other commands; the rest goes beside it
    tower : str
        the vision tower, as `tower_digest` has it
    facts : dict[str, Any]
        of the run
    plots : bool
        whether a plot can be drawn
    """

    out: Path
    tower: str
    facts: dict[str, Any]
    plots: bool

    def options(self, found: Sequence[Found]) -> None:
        """Options that were found: tables on the terminal, and all files."""
        facts = self.facts
        print(render({"explained": facts["explained"]}, found, TERMINAL, SHOWN), end="")
        draw = partial(plot, f"{facts['model']} {facts['explained']}", found)
        rows = {each.space: [vars(row) for row in each.rows] for each in found}
        content = _plain({**facts, "rows": rows})
        page = render(facts, found, MARKDOWN, None)
        write_results(self._beside("table"), content, page, draw if self.plots else None)
        for each in [*found] * (len(found) > 1):
            self._write(Path(f"{self._beside(_slug(each.space))}{ENDING}"), each)
        best = best_of(found)
        self._write(self.out, best)
        say(f"wrote {self.out}: {best.verdict.chosen}")

    def curves(self, curves: Sequence[Curve]) -> None:
        """Agreement by budget; raises EvaluationError where nothing keeps enough."""
        facts = self.facts
        print(agreement.render({"explained": facts["explained"]}, curves, TERMINAL), end="")
        draw = partial(agreement.plot, facts["model"], curves)
        content = _plain({**facts, "rows": [asdict(each) for each in curves]})
        page = agreement.render(facts, curves, MARKDOWN)
        write_results(self._beside("curve"), content, page, draw if self.plots else None)
        best = agreement.smallest_of(curves)
        if best is None or best.smallest is None:
            raise EvaluationError(
                f"nothing keeps {curves[0].wanted:.1%} of the answers: {self.out} is not written"
            )
        found = {
            "same_answers": best.judged,
            "tokens": best.smallest.kept,
            "interval_of_r_max": [best.low, best.high],
            "verdict": best.words(),
        }
        self._tuned(self.out, best.smallest.candidate, found)
        say(f"wrote {self.out}: {best.smallest.candidate}")

    def _write(self, path: Path, found: Found) -> None:
        judged = {
            "divergence": found.chosen.judged_by,
            "same_answers": found.chosen.same,
            "tokens": found.chosen.kept,
            "gain_over_default": found.verdict.gain,
            "verdict": found.verdict.words(),
        }
        self._tuned(path, found.verdict.chosen, judged)

    def _tuned(self, path: Path, pruning: PruningConfig, found: dict[str, Any]) -> None:
        told = {name: self.facts[name] for name in KEPT}
        write_tuned(path, pruning, self.tower, _plain({**found, **told}))

    def _beside(self, what: str) -> Path:
        return self.out.with_name(f"{self.out.stem}-{what}")


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Interval):
        return asdict(value)
    return value


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._+" else "-" for letter in text)
