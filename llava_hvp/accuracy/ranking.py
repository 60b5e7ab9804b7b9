"""Methods in the order of their scores, and which of them are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_hvp.accuracy.scores import Difference, VariantScore
from llava_hvp.accuracy.tables import (
    best_reference,
    choice_columns,
    choices_explained,
    heading,
)
from llava_hvp.tables import MARKDOWN, text_table

FEWEST = 2  # methods at a budget that have an order
EXPLAINED = (
    "Percent of {questions} questions answered right. All were asked the same questions, so that "
    "differences are paired by question, in percent points with the half width of their 95 % "
    "interval: `over the next` in the table; `over chance`, over the better of `random` and "
    "`uniform`. `level with`: methods further down whose difference may be nothing. Each interval "
    "stands by itself: one in twenty pairs that are level looks told apart. Unpruned: {unpruned}."
)


def is_ranked(scores: Sequence[VariantScore]) -> bool:
    """Whether there is a budget at which methods have an order."""
    return bool(_by_budget(scores))


def render_ranking(about: dict[str, Any], scores: Sequence[VariantScore]) -> str:
    """A page in Markdown: all methods by budget, then the order at each."""
    none, ranked = scores[0], _by_budget(scores)
    unpruned = f"{none.overall:.1f} ± {none.half_width:.1f}"
    parts = [
        *heading(about, MARKDOWN),
        EXPLAINED.format(questions=none.questions, unpruned=unpruned),
        *choices_explained(about, scores),
        "Percent right, and the place at that budget; from the best mean on.",
        text_table(_overview(ranked), MARKDOWN),
    ]
    for budget, placed in ranked.items():
        rows = [_row(place, placed, scores) for place in range(len(placed))]
        parts += [f"## {budget or 'the default budget'}", text_table(rows, MARKDOWN)]
    return "\n\n".join(parts) + "\n"


def _by_budget(scores: Sequence[VariantScore]) -> dict[str, list[VariantScore]]:
    """Pruned ones, the best first; those with one score stand as they were given."""
    budgets: dict[str, list[VariantScore]] = {}
    for score in scores[1:]:
        budgets.setdefault(score.budget, []).append(score)
    return {
        budget: sorted(found, key=lambda score: -score.overall)
        for budget, found in budgets.items()
        if len(found) >= FEWEST
    }


def _overview(ranked: dict[str, list[VariantScore]]) -> list[dict[str, str]]:
    """A row for each method with its score and place at every budget."""
    places: dict[str, dict[str, tuple[float, int]]] = {}
    for budget, placed in ranked.items():
        for place, score in enumerate(placed, 1):
            places.setdefault(score.label, {})[budget] = score.overall, place

    def mean(label: str) -> float:
        return sum(overall for overall, _ in places[label].values()) / len(places[label])

    return [
        {
            "method": label,
            **{
                budget: "{:.1f} ({})".format(*places[label][budget])
                if budget in places[label]
                else ""
                for budget in ranked
            },
            "mean": f"{mean(label):.1f}",
        }
        for label in sorted(places, key=mean, reverse=True)
    ]


def _row(
    place: int, placed: Sequence[VariantScore], scores: Sequence[VariantScore]
) -> dict[str, str]:
    score, below = placed[place], placed[place + 1 :]
    level = [other.label for other in below if not Difference.of(score, other).is_told]
    reference = best_reference(score, placed)
    return {
        "": str(place + 1),
        "method": score.label,
        "of patches": f"{score.kept_of_patches:.1%}",
        "right": f"{score.overall:.1f} ± {score.half_width:.1f}",
        "over the next": str(Difference.of(score, below[0])) if below else "",
        "over chance": "" if reference is None else str(Difference.of(score, reference)),
        **choice_columns(score, scores),
        "level with": ", ".join(level),
    }
