"""What was found, for people: tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from llava_hvp.runtime import PruningConfig
from llava_hvp.tables import text_table
from llava_hvp.tune.candidates import Space
from llava_hvp.tune.search import CHOOSING, JUDGING, Field, judged
from llava_hvp.tune.verdict import Interval, Verdict, kl_of, same_of

SHOWN = 12  # candidates of a space in a terminal


@dataclass(frozen=True)
class Row:
    """A candidate, and what it does to answers.

    Parameters
    ----------
    chosen_by, judged_by : Interval | Interval | None
        its divergence on the half that chooses, and on the one that judges; None where not judged
    same : Interval | None
        share of answers that stay the same, on the half that judges
    kept : float
        visual tokens of an image that enter a layer on average, on the half that chooses
    """

    candidate: str
    chosen_by: Interval
    judged_by: Interval | None
    same: Interval | None
    kept: float


@dataclass(frozen=True)
class Found:
    """What the search came to of one method at one budget."""

    space: str
    rows: tuple[Row, ...]
    verdict: Verdict

    @classmethod
    def of(cls, field: Field, space: Space, ranked: Sequence[PruningConfig]) -> Found:
        """Of what was measured."""
        finalists = {str(each) for each in judged(space, ranked)}
        rows = tuple(_row(field, each, str(each) in finalists) for each in ranked)
        default, winner = space.default(), ranked[0]
        sheets = field.sheets[JUDGING]
        of_default = kl_of(sheets, field.measured.of(JUDGING, default))
        of_winner = kl_of(sheets, field.measured.of(JUDGING, winner))
        gain = (of_default - of_winner).interval()
        return cls(str(space), rows, Verdict(winner, default, gain, len(of_default)))

    @property
    def chosen(self) -> Row:
        """The row of what is written down."""
        name = str(self.verdict.chosen)
        return next(row for row in self.rows if row.candidate == name)


def _row(field: Field, candidate: PruningConfig, is_judged: bool) -> Row:
    choosing = field.measured.of(CHOOSING, candidate)
    judging = field.measured.of(JUDGING, candidate) if is_judged else None
    sheets = field.sheets
    asked = sum(len(sheet.asked) for sheet in sheets[CHOOSING])
    return Row(
        str(candidate),
        kl_of(sheets[CHOOSING], choosing).interval(),
        None if judging is None else kl_of(sheets[JUDGING], judging).interval(),
        None if judging is None else same_of(sheets[JUDGING], judging).interval(),
        sum(each.kept for each in choosing) / asked,
    )


def best_of(found: Sequence[Found]) -> Found:
    """Of several methods and budgets the one that moves the answers of the judging half least."""

    def moved(each: Found) -> float:
        judged_by = each.chosen.judged_by
        assert judged_by is not None  # what is chosen was judged
        return judged_by.mean

    return min(found, key=moved)


def render(about: dict[str, Any], found: Sequence[Found], style: str, most: int | None) -> str:
    """The tables, with a verdict below each.

    Parameters
    ----------
    most : int | None
        rows of a table
    """
    parts = (
        [about["explained"]]
        if not about.get("command")
        else [
            f"`{about['command']}`",
            f"{about['model']} {about['machine']}; {about['versions']}.",
            about["explained"],
        ]
    )
    for each in found:
        rows = each.rows if most is None else each.rows[:most]
        default = str(each.verdict.default)
        if all(row.candidate != default for row in rows):
            rows = (*rows, next(row for row in each.rows if row.candidate == default))
        parts += [
            text_table([_cells(row, default) for row in rows], style),
            f"{each.space}: {each.verdict.words()}",
        ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, default: str) -> dict[str, str]:
    return {
        "candidate": row.candidate + " (default)" * (row.candidate == default),
        "divergence": row.chosen_by.words(),
        "judged": "" if row.judged_by is None else row.judged_by.words(),
        "same answers": "" if row.same is None else row.same.words(".1%"),
        "tokens": f"{row.kept:.1f}",
    }


def plot(title: str, found: Sequence[Found], file: BinaryIO) -> None:
    """Divergence of every candidate, the least above, with its interval."""
    import textwrap

    from matplotlib.figure import Figure

    tallest = max(len(each.rows) for each in found)
    size = (5.5 * len(found) + 2, 2 + 0.26 * tallest)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, int(10 * size[0]))), fontsize="medium")
    for axis, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        rows, default = list(each.rows)[::-1], str(each.verdict.default)
        for place, row in enumerate(rows):
            shown = row.chosen_by
            colour = "#d55e00" if row.candidate == default else "#0072b2"
            axis.plot([shown.low, shown.high], [place, place], color=colour, linewidth=1)
            axis.plot([shown.mean], [place], "o", color=colour, markersize=4)
            if row.judged_by is not None:
                axis.plot([row.judged_by.mean], [place], "x", color=colour)
        prefix = f"{each.space} "
        names = [
            "default" if row.candidate == default else row.candidate.removeprefix(prefix)
            for row in rows
        ]
        axis.set_yticks(range(len(rows)), names, fontsize="small")
        axis.set_title(each.space)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.supxlabel(
        "nats an answer away from the unpruned ones; x: on the pictures that judge",
        fontsize="medium",
    )
    figure.savefig(file, format="png", dpi=100)
