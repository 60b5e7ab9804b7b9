"""What marks come to: the score of each variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava_hvp.accuracy.exam import Marks

Z_95 = 1.959964  # 95 % of a normal distribution are within so many standard deviations


@dataclass(frozen=True)
class VariantScore:
    """The score of one variant.

    Parameters
    ----------
    tasks : dict[str, float]
        task -> percent right
    overall, half_width : float
        percent right of all, and half the width of its 95 % interval
    kept_tokens : float | None
        of an image, mean; None for unpruned LLaVA, which sends all
    time : float
        ratio to unpruned
    """

    method: str
    options: str
    tasks: dict[str, float]
    overall: float
    half_width: float
    questions: int
    kept_tokens: float | None
    kept_of_patches: float
    time: float


def scores_of(marks: Sequence[Marks]) -> list[VariantScore]:
    """One a variant; the first is unpruned."""
    return [_score(mark, marks[0]) for mark in marks]


def _score(mark: Marks, none: Marks) -> VariantScore:
    asked = mark.images
    right = sum(mark.right.values())
    low, high = wilson_interval(right, asked)
    is_none = not mark.variant.prunes
    return VariantScore(
        method=mark.variant.name,
        options=mark.variant.options,
        tasks={task: 100 * mark.right[task] / count for task, count in mark.asked.items()},
        overall=100 * right / asked,
        half_width=100 * (high - low) / 2,
        questions=asked,
        kept_tokens=None if is_none else mark.kept / asked,
        kept_of_patches=1.0 if is_none else mark.kept_of_patches / asked,
        time=mark.seconds / none.seconds,
    )


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """Bounds of the share of right answers, with 95 % confidence: Wilson's score interval.

    Unlike the normal approximation it has a width where all answers are right, or none.
    """
    square = Z_95**2 / asked
    share = right / asked
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return middle - half, middle + half
