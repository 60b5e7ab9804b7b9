"""What marks come to: the score of each variant, and how far two are apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llava_hvp.accuracy.choice import HALVES
from llava_hvp.accuracy.exam import Marks
from llava_hvp.accuracy.store import Answers, Chosen

Z_95 = 1.959964  # 95 % of a normal distribution are within so many standard deviations


@dataclass(frozen=True)
class VariantScore:
    """The score of one variant.

    Parameters
    ----------
    budget : str
        the part of `options` that says it, as `r_max=0.5`
    tasks : dict[str, float]
        task -> percent right
    overall, half_width : float
        percent right of all, and half the width of its 95 % interval
    kept_tokens : float | None
        of an image, mean; None for unpruned LLaVA, which sends all
    time : float
        ratio to unpruned
    choice : float | None
        what scoring and choosing add to the image encode, as a share of the encode with the patches
        known beforehand: median; None for unpruned
    stability : dict[str, float | None]
        dtype -> share of the patches kept in float32 that are kept in this dtype too; None where it
        cannot be computed
    each : str
        of every question whether its answer is right, a bit each, as a hexadecimal number; of one
        exam all variants have the questions in one order
    """

    method: str
    options: str
    budget: str
    tasks: dict[str, float]
    overall: float
    half_width: float
    questions: int
    kept_tokens: float | None
    kept_of_patches: float
    time: float
    choice: float | None
    stability: dict[str, float | None]
    each: str

    @property
    def label(self) -> str:
        """The method with the options that it has besides its budget."""
        return f"{self.method} {self.options.removeprefix(self.budget)}".replace("  ", " ").strip()


def scores_of(marks: Sequence[Marks], answers: Answers | None = None) -> list[VariantScore]:
    """One a variant; the first is unpruned.

    Parameters
    ----------
    answers : Answers | None
        where the choices are, if they were looked at
    """
    answers = Answers() if answers is None else answers
    return [_score(mark, marks[0], answers.all_chosen(str(mark.variant))) for mark in marks]


def _score(mark: Marks, none: Marks, chosen: Sequence[Chosen]) -> VariantScore:
    asked = mark.images
    right = sum(mark.right.values())
    low, high = wilson_interval(right, asked)
    is_none = not mark.variant.prunes
    return VariantScore(
        method=mark.variant.name,
        options=mark.variant.options,
        budget="" if mark.variant.pruning is None else mark.variant.pruning.budget,
        tasks={task: 100 * mark.right[task] / count for task, count in mark.asked.items()},
        overall=100 * right / asked,
        half_width=100 * (high - low) / 2,
        questions=asked,
        kept_tokens=None if is_none else mark.kept / asked,
        kept_of_patches=1.0 if is_none else mark.kept_of_patches / asked,
        time=mark.seconds / none.seconds,
        choice=statistics.median(c.encode / c.floor - 1 for c in chosen) if chosen else None,
        stability={name: _in_common(name, chosen) for name in HALVES} if chosen else {},
        each=f"{int(''.join('01'[right] for right in mark.each), 2):x}",
    )


def _in_common(dtype: str, chosen: Sequence[Chosen]) -> float | None:
    if any(dtype not in of_sheet.common for of_sheet in chosen):
        return None
    return sum(c.common[dtype] for c in chosen) / sum(c.kept for c in chosen)


@dataclass(frozen=True)
class Difference:
    """How many percent points more questions one variant answers rightly than another.

    Parameters
    ----------
    points, half_width : float
        the estimate, and half the width of its 95 % interval
    """

    points: float
    half_width: float

    @classmethod
    def of(cls, one: VariantScore, other: VariantScore) -> Difference:
        """Paired by question, which both were asked: only where one is right does it count.

        Agresti and Min's interval (Statistics in Medicine 24, 2005), which has a width where no
        answer differs.
        """
        ones, others = int(one.each, 16), int(other.each, 16)
        gained = (ones & ~others).bit_count() + 0.5
        lost = (others & ~ones).bit_count() + 0.5
        asked = one.questions + 2
        mean = (gained - lost) / asked
        deviation = math.sqrt((gained + lost) / asked - mean**2) / math.sqrt(asked)
        return cls(100 * mean, 100 * Z_95 * deviation)

    @property
    def is_told(self) -> bool:
        """Whether the two are told apart: the interval is all on one side of none."""
        return abs(self.points) > self.half_width

    def __str__(self) -> str:
        return f"{self.points:+.1f} ± {self.half_width:.1f}"


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """Bounds of the share of right answers, with 95 % confidence: Wilson's score interval.

    Unlike the normal approximation it has a width where all answers are right, or none.
    """
    square = Z_95**2 / asked
    share = right / asked
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return middle - half, middle + half
