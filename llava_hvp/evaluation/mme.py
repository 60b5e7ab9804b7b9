"""MME: answers in the form that its own scorer reads, and the same score counted here."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_whole

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation"),
    *("text_translation", "code_reasoning"),
)
SUFFIXES = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def write_answers(images: Path, store: Store, folder: Path) -> Path:
    """A text file a category, two lines a picture: file, question, truth and answer."""
    truths = _truths(images)
    pictures: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for answer in store.in_order:
        name, prompt = answer.record["question_id"], answer.record["prompt"]
        category, file = name.split("/")[0], Path(name).stem
        key = (category, file, _bare(prompt))
        if key not in truths:
            raise EvaluationError(f"{images / category} has no truth for {name}: {prompt!r}")
        question, truth = truths[key]
        # One line an answer, whatever is in it.
        text = " ".join(answer.record["text"].split())
        pictures[category][file].append(f"{file}.txt\t{question}\t{truth}\t{text}\n")
    folder.mkdir(exist_ok=True)
    for category, files in pictures.items():
        lines = "".join(line for file in files.values() for line in file)
        write_whole(folder / f"{category}.txt", lines.encode())
    return folder


def _truths(images: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(category, file, bare question) -> the question in full and its truth."""
    found = {}
    for category in sorted(path for path in images.iterdir() if path.is_dir()):
        below = category / "questions_answers_YN"
        for path in sorted((below if below.is_dir() else category).glob("*.txt")):
            for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
                question, tab, truth = line.strip().partition("\t")
                if tab:
                    key = (category.name, path.stem, _bare(question))
                    found[key] = question, truth.strip()
    return found


def _bare(question: str) -> str:
    for suffix in SUFFIXES:
        question = question.replace(suffix, "")
    return " ".join(question.split())


def count(folder: Path) -> dict[str, float]:
    """Accuracy and accuracy+ (both questions of a picture right) in percent, added up.

    An answer counts as its first four letters hold yes or, failing that, no.
    """
    scores = {}
    for path in sorted(folder.glob("*.txt")):
        right: dict[str, list[bool]] = defaultdict(list)
        for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
            file, _, truth, answer = line.split("\t")
            start = answer.lower()[:4]
            said = "yes" if "yes" in start else "no" if "no" in start else ""
            right[file].append(said == truth.lower())
        flat = [each for pair in right.values() for each in pair]
        both = [all(pair) for pair in right.values()]
        scores[path.stem] = 100 * sum(flat) / len(flat) + 100 * sum(both) / len(both)
    perception = sum(scores.get(name, 0) for name in PERCEPTION)
    cognition = sum(scores.get(name, 0) for name in COGNITION)
    return {
        "perception": perception,
        "cognition": cognition,
        "total": perception + cognition,
        **scores,
    }
