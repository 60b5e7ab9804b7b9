"""What the numbers say and what they do not: intervals by bootstrap over pictures, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.runtime import PruningConfig
from llava_hvp.tune.divergence import Moved
from llava_hvp.tune.questions import Sheet

RESAMPLES = 2000
TAIL = 0.025  # on each side of an interval
FEWEST = 20  # pictures: resampling fewer tells of too narrow an interval


@dataclass(frozen=True)
class Interval:
    """A mean with the 95 % interval of a bootstrap over pictures."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    def words(self, form: str = ".3f") -> str:
        """As `0.131 (0.102 to 0.164)`."""
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Sample:
    """A value for each question, added up by picture: questions about one lean on each other.

    Parameters
    ----------
    sums : Tensor
        (P,) float64, over the questions about each picture
    counts : Tensor
        (P,) float64, how many those are
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, sheets: Sequence[Sheet], values: Sequence[Sequence[float]]) -> Sample:
        """Of values by sheet and row; pictures in the order of their names."""
        totals: dict[str, tuple[float, int]] = {}
        for sheet, row in zip(sheets, values, strict=True):
            for asked, value in zip(sheet.asked, row, strict=True):
                total, count = totals.get(asked.picture, (0.0, 0))
                totals[asked.picture] = total + float(value), count + 1
        found = torch.tensor([totals[name] for name in sorted(totals)], dtype=torch.float64)
        return cls(found[:, 0], found[:, 1])

    def __sub__(self, other: Sample) -> Sample:
        return Sample(self.sums - other.sums, self.counts)

    def __len__(self) -> int:
        return len(self.sums)

    def means(self, draws: Tensor) -> Tensor:
        """(R,) float64 means over drawn pictures, (R, P)."""
        return self.sums[draws].sum(1) / self.counts[draws].sum(1)

    def interval(self) -> Interval:
        """Its mean over questions."""
        mean = float(self.sums.sum() / self.counts.sum())
        low, high = bounds(self.means(resamples(len(self))))
        return Interval(mean, low, high)


def resamples(pictures: int) -> Tensor:
    """(R, P) indices, the same for equal P, so that differences are paired."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(pictures, (RESAMPLES, pictures), generator=generator)


def bounds(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return float(ordered[round(TAIL * last)]), float(ordered[round((1 - TAIL) * last)])


def kl_of(sheets: Sequence[Sheet], moved: Sequence[Moved]) -> Sample:
    """The divergence of one candidate."""
    return Sample.of(sheets, [each.kl for each in moved])


def same_of(sheets: Sequence[Sheet], moved: Sequence[Moved]) -> Sample:
    """Which answers of one candidate stay the same."""
    return Sample.of(sheets, [[float(same) for same in each.same] for each in moved])


@dataclass(frozen=True)
class Verdict:
    """What the judging half says of the winner of the choosing half.

    Parameters
    ----------
    gain : Interval
        divergence of the default less the winner's, in nats an answer, paired by picture
    pictures : int
        that judged
    """

    winner: PruningConfig
    default: PruningConfig
    gain: Interval
    pictures: int

    @property
    def is_default(self) -> bool:
        """Whether the winner is the default, or chooses exactly as it does."""
        return str(self.winner) == str(self.default) or self.gain == Interval(0, 0, 0)

    @property
    def is_better(self) -> bool:
        """Whether the winner moves answers less than the default, beyond chance."""
        return self.gain.low > 0 and self.pictures >= FEWEST

    @property
    def is_worse(self) -> bool:
        """Whether it moves them more, beyond chance."""
        return self.gain.high < 0 and self.pictures >= FEWEST

    @property
    def would_decide(self) -> int | None:
        """About how many judging pictures would tell the two apart; None where they are, or alike.

        Intervals shrink with the root of the number.
        """
        if self.is_better or self.is_worse or self.gain.mean == 0:
            return None
        ratio = self.gain.half_width / abs(self.gain.mean)
        return max(FEWEST, math.ceil(self.pictures * ratio**2))

    @property
    def chosen(self) -> PruningConfig:
        """What is written down: the winner, unless the judging half has it worse beyond chance."""
        return self.default if self.is_worse else self.winner

    def words(self) -> str:
        """In one sentence."""
        gain = f"{self.gain.words()} nats an answer on the {self.pictures} pictures that judge"
        if self.is_default:
            return "Nothing that was tried moves the answers less than the default does."
        if self.is_better:
            return f"Better than the default beyond chance: by {gain}."
        if self.is_worse:
            return f"Worse than the default beyond chance, by {gain}: the default is kept."
        decide = (
            ""
            if self.would_decide is None
            else (f" About {2 * self.would_decide} pictures, half of them to judge, would decide.")
        )
        return f"Not better than the default beyond chance: by {gain}.{decide}"
