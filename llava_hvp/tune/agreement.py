"""How few tokens: the smallest budget at which answers still agree with the unpruned model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava_hvp.errors import LlavaHvpError
from llava_hvp.runtime import PruningConfig
from llava_hvp.tables import text_table
from llava_hvp.tune.search import CHOOSING, JUDGING, Field
from llava_hvp.tune.verdict import FEWEST, Interval, bounds, resamples, same_of

GRID = (0.9, 0.75, 0.6, 0.5, 0.4, 0.33, 0.25, 0.16, 0.11, 0.06)  # of r_max, a first look
BISECTIONS = 2  # between the smallest that agrees and the next below

At = Callable[[float], PruningConfig]  # of r_max


@dataclass(frozen=True)
class Point:
    """A method at one budget.

    Parameters
    ----------
    same : Interval
        share of answers that stay the same, on the half that chooses
    kept : float
        visual tokens of an image that enter a layer, on average
    """

    r_max: float
    candidate: PruningConfig
    same: Interval
    kept: float


@dataclass(frozen=True)
class Curve:
    """Agreement of a method with the unpruned model, from large budgets to small ones.

    Parameters
    ----------
    wanted : float
        share of answers that are to stay the same
    smallest : Point | None
        with the smallest budget that keeps it, as all larger ones do; None where not even the
        largest does
    low, high : float
        95 % interval of that budget, by a bootstrap over pictures
    judged : Interval | None
        agreement there on the half that judges
    pictures : int
        that chose
    """

    method: str
    wanted: float
    points: tuple[Point, ...]
    smallest: Point | None
    low: float
    high: float
    judged: Interval | None
    pictures: int

    def words(self) -> str:
        """In a sentence or two."""
        if self.smallest is None or self.judged is None:
            largest = self.points[0]
            return (
                f"{self.method}: no budget below 1 keeps {self.wanted:.1%} of the answers; "
                f"r_max={largest.r_max:g} keeps {largest.same.words('.1%')}."
            )
        few = "" if self.pictures >= FEWEST else " Too few pictures to trust the interval."
        return (
            f"{self.method}: r_max={self.smallest.r_max:g} ({self.low:g} to {self.high:g}) is the "
            f"smallest that keeps {self.wanted:.1%} of the answers: {self.smallest.kept:.1f} "
            f"tokens an image. On the pictures that judge it keeps {self.judged.words('.1%')}."
            + few
        )


def curve(field: Field, method: str, wanted: float, at: At) -> Curve:
    """Measure a method at a grid of budgets, and between the two around the wanted agreement.

    Budgets that the method cannot meet on this model are left out; raises the LlavaHvpError of the
    largest where it can meet none.
    """
    tried = _possible(field, at)
    field.measure(CHOOSING, list(tried.values()))
    for _ in range(BISECTIONS):
        ordered = sorted(tried, reverse=True)
        means = torch.tensor([[_same(field, tried[each]).mean for each in ordered]])
        place = int(_last_kept(means, wanted))
        if place + 1 == len(ordered):  # the smallest of all keeps it
            break
        between = round(((1.0, *ordered)[place + 1] + ordered[place + 1]) / 2, 3)
        tried[between] = at(between)
        field.measure(CHOOSING, [tried[between]])
    return _curve(field, method, wanted, dict(sorted(tried.items(), reverse=True)))


def _possible(field: Field, at: At) -> dict[float, PruningConfig]:
    found: dict[float, PruningConfig] = {}
    refused: LlavaHvpError | None = None
    for r_max in GRID:
        try:
            found[r_max] = at(r_max)
        except LlavaHvpError as error:
            refused = refused or error
    if not found and refused is not None:
        raise refused
    return found


def _curve(field: Field, method: str, wanted: float, tried: dict[float, PruningConfig]) -> Curve:
    sheets = field.sheets[CHOOSING]
    asked = sum(len(sheet.asked) for sheet in sheets)
    points = [
        Point(
            r_max,
            candidate,
            _same(field, candidate),
            sum(each.kept for each in field.measured.of(CHOOSING, candidate)) / asked,
        )
        for r_max, candidate in tried.items()
    ]
    samples = [same_of(sheets, field.measured.of(CHOOSING, c)) for c in tried.values()]
    draws = resamples(len(samples[0]))
    places = _last_kept(torch.stack([sample.means(draws) for sample in samples], 1), wanted)
    budgets = torch.tensor([*tried, 1.0], dtype=torch.float64)  # -1 is all tokens
    place = int(_last_kept(torch.tensor([[point.same.mean for point in points]]), wanted))
    smallest, judged = (points[place] if place >= 0 else None), None
    if smallest is not None:
        field.measure(JUDGING, [smallest.candidate])
        found = field.measured.of(JUDGING, smallest.candidate)
        judged = same_of(field.sheets[JUDGING], found).interval()
    low, high = (round(each, 3) for each in bounds(budgets[places]))
    pictures = len(samples[0])
    return Curve(method, wanted, tuple(points), smallest, low, high, judged, pictures)


def _same(field: Field, candidate: PruningConfig) -> Interval:
    return same_of(field.sheets[CHOOSING], field.measured.of(CHOOSING, candidate)).interval()


def _last_kept(means: Tensor, wanted: float) -> Tensor:
    """(R,) place of the last of (R, budgets) that is wanted as all before it are; -1 for none."""
    return (means >= wanted - 1e-9).long().cumprod(1).sum(1) - 1


def smallest_of(curves: Sequence[Curve]) -> Curve | None:
    """The curve whose smallest budget sends the fewest tokens; None where none keeps enough."""
    found = [(each.smallest.kept, n) for n, each in enumerate(curves) if each.smallest is not None]
    return curves[min(found)[1]] if found else None


def render(about: dict[str, Any], curves: Sequence[Curve], style: str) -> str:
    """A table of each curve, and what it says."""
    parts = [f"`{about['command']}`"] if "command" in about else []
    if "machine" in about:
        parts.append(f"{about['model']} {about['machine']}; {about['versions']}.")
    parts.append(about["explained"])
    for each in curves:
        rows = [
            {
                "candidate": str(point.candidate),
                "same answers": point.same.words(".1%"),
                "tokens": f"{point.kept:.1f}",
            }
            for point in each.points
        ]
        parts += [text_table(rows, style), each.words()]
    return "\n\n".join(parts) + "\n"


def plot(title: str, curves: Sequence[Curve], file: BinaryIO) -> None:
    """Agreement against kept tokens, with intervals."""
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize="medium")
    axis = figure.subplots()
    for each in curves:
        kept = [point.kept for point in each.points]
        (line,) = axis.plot(
            kept, [100 * point.same.mean for point in each.points], marker="o", label=each.method
        )
        axis.fill_between(
            kept,
            [100 * point.same.low for point in each.points],
            [100 * point.same.high for point in each.points],
            color=line.get_color(),
            alpha=0.15,
        )
        if each.smallest is not None:
            axis.axvline(each.smallest.kept, color=line.get_color(), linestyle=":")
    axis.axhline(100 * curves[0].wanted, color="grey", linewidth=1)
    axis.set_xlabel("visual tokens of an image")
    axis.set_ylabel("answers that stay the same, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, format="png", dpi=100)
