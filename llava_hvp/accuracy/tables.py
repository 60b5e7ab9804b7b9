"""Scores as tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from llava_hvp.accuracy.scores import Difference, VariantScore
from llava_hvp.tables import MARKDOWN, text_table

EXPLAINED = (
    "Percent of questions answered right, asked in the template {template}, greedily; `all` with "
    "the half width of its 95 % interval. `kept`: mean visual tokens of an image, `of patches`: "
    "kept patches / all patches (of a method inside the language model both are means over its "
    "layers), `time`: of all questions, from image to answer, as ratio to "
    "unpruned, taken in turns."
)
CHOICES_EXPLAINED = (
    "On {looked_at} of the pictures, each with its question: `choice`: what scoring, choosing and "
    "merging add to the image encode, the prompt's own encoding included, as a share of the encode "
    "with these patches known beforehand, which runs right before; the median, good to a few "
    "percent (`random` and `uniform` add nothing). {halves}: share of the patches kept in float32 "
    "that the model kept in this dtype too, weights and images rounded to it, with the vision "
    "tower's own attention{missing}{inside}."
)
REFERENCES = ("random", "uniform")
COLOURED = 6  # lines of a plot that eyes can follow


def render(about: dict[str, Any], scores: Sequence[VariantScore], style: str) -> str:
    """The command and the machine, then a row for each variant."""
    tasks = list(scores[0].tasks)
    table = [
        {
            **kept_columns(score),
            **{task: f"{score.tasks[task]:.1f}" for task in tasks},
            "all": f"{score.overall:.1f} ± {score.half_width:.1f}",
            "time": f"{score.time:.2f}",
            **(choice_columns(score, scores)),
        }
        for score in scores
    ]
    parts = [
        *heading(about, style),
        EXPLAINED.format(**about),
        *choices_explained(about, scores),
        text_table(table, style),
        *no_better(scores),
    ]
    return "\n\n".join(parts) + "\n"


def heading(about: dict[str, Any], style: str) -> list[str]:
    """Paragraphs: the command, the machine, the model."""
    code = "    " if style == MARKDOWN else ""
    return [
        f"{code}{about['command']}",
        f"{about['machine']}; {about['versions']}.",
        about["model"],
        *([about["note"]] if "note" in about else []),
    ]


def kept_columns(score: VariantScore) -> dict[str, str]:
    """Cells that say what was run, and how much it keeps."""
    return {
        "method": score.method,
        "options": score.options,
        "kept": "" if score.kept_tokens is None else f"{score.kept_tokens:.1f}",
        "of patches": f"{score.kept_of_patches:.1%}",
    }


def choice_columns(score: VariantScore, scores: Sequence[VariantScore]) -> dict[str, str]:
    """Cells on the choice of patches; none where nothing in the table chose any."""
    halves = next((other.stability for other in scores if other.stability), {})
    if not halves:
        return {}
    shares = {name: score.stability.get(name) for name in halves}
    return {
        "choice": "" if score.choice is None else f"{score.choice:+.0%}",
        **{name: "" if share is None else f"{share:.1%}" for name, share in shares.items()},
    }


def choices_explained(about: dict[str, Any], scores: Sequence[VariantScore]) -> list[str]:
    """The paragraph on those cells."""
    stabilities = [score.stability for score in scores if score.stability]
    if not stabilities:
        return []
    inside = any(score.choice is None and score.budget for score in scores)
    missing = any(share is None for stability in stabilities for share in stability.values())
    return [
        CHOICES_EXPLAINED.format(
            looked_at=about["looked_at"],
            halves=", ".join(f"`{name}`" for name in stabilities[0]),
            missing="; none where that cannot be computed" if missing else "",
            inside="; none of what is chosen inside the language model" if inside else "",
        )
    ]


def best_reference(score: VariantScore, scores: Sequence[VariantScore]) -> VariantScore | None:
    """The better of `random` and `uniform` at the budget of another method."""
    if score.method in ("none", *REFERENCES):
        return None
    beside = [s for s in scores if s.method in REFERENCES and s.budget == score.budget]
    return max(beside, key=lambda s: s.overall, default=None)


def no_better(scores: Sequence[VariantScore]) -> list[str]:
    """A paragraph on methods that are not above the better reference by more than chance."""
    lines = []
    for budget in dict.fromkeys(score.budget for score in scores):
        found: dict[str, list[str]] = {"below": [], "no better than": []}
        best = None
        for score in (score for score in scores if score.budget == budget):
            reference = best_reference(score, scores)
            if reference is None:
                continue
            best, over = reference, Difference.of(score, reference)
            if over.points <= 0 or not over.is_told:
                word = "below" if over.is_told else "no better than"
                found[word].append(f"{score.label} ({score.overall:.1f})")
        if best is not None:
            lines += [
                f"- {budget}: {word} {best.method} ({best.overall:.1f}): {', '.join(named)}"
                for word, named in found.items()
                if named
            ]
    return [
        "Beside the better of `random` and `uniform`, paired by question:\n\n" + "\n".join(lines)
    ] * bool(lines)


def title_of(about: dict[str, Any]) -> str:
    """What a plot shows, in a line; machine and versions are in the table."""
    return f"Right answers: {about['model'].partition(', up to ')[0]}"


def plot(title: str, scores: Sequence[VariantScore], file: BinaryIO) -> None:
    """Write `figure_of` as a PNG."""
    figure_of(title, scores).savefig(file, format="png", dpi=100)


def figure_of(title: str, scores: Sequence[VariantScore]) -> Any:
    """Accuracy of all tasks together, and of each, against kept patches, on one scale."""
    import textwrap

    from matplotlib.figure import Figure

    none, *pruned = scores
    panels = ["all", *none.tasks]
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 120)), fontsize="large")
    axes = figure.subplots(
        2, -(-len(panels) // 2), sharex=True, sharey=True, squeeze=False
    ).flatten()
    for axis, panel in zip(axes, panels, strict=False):

        def of(score: VariantScore, panel: str = panel) -> float:
            return score.overall if panel == "all" else score.tasks[panel]

        axis.axhline(of(none), color="grey", linewidth=1, label="unpruned")
        for name, look in _looks(pruned).items():
            found = sorted((s for s in pruned if s.label == name), key=lambda s: s.kept_of_patches)
            axis.plot([100 * s.kept_of_patches for s in found], [of(s) for s in found], **look)
        axis.set_title("all tasks" if panel == "all" else panel)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    lines, names = axes[0].get_legend_handles_labels()
    if len(panels) < len(axes):
        axes[-1].legend(lines, names, loc="center")
    else:
        axes[0].legend(lines, names, fontsize="small")
    figure.supxlabel("patches kept, %", fontsize="medium")
    figure.supylabel("questions answered right, %", fontsize="medium")
    return figure


def _looks(pruned: Sequence[VariantScore]) -> dict[str, dict[str, Any]]:
    """How the line of each method is drawn; of many, colours are for the best on average."""
    from llava_hvp.evaluation.plot import STYLES

    def mean(name: str) -> float:
        found = [score.overall for score in pruned if score.label == name]
        return sum(found) / len(found)

    names = sorted(dict.fromkeys(score.label for score in pruned), key=mean, reverse=True)
    rivals = [name for name in names if name not in REFERENCES]
    looks: dict[str, dict[str, Any]] = {}
    # What is drawn first lies below.
    for rank, name in reversed(list(enumerate(rivals[COLOURED:]))):
        label = f"{len(rivals) - COLOURED} others" if rank == 0 else None
        looks[name] = {"color": "lightgrey", "linewidth": 1, "label": label}
    for name, style in zip(REFERENCES, (":", "--"), strict=True):
        if name in names:
            looks[name] = {"color": "black", "linestyle": style, "label": name}
    for name, (colour, marker) in zip(rivals[:COLOURED], STYLES, strict=False):
        looks[name] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
    return looks
