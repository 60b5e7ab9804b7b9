"""A benchmark's files on this machine, looked for before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.benchmarks import GUIDE, Benchmark
from llava_hvp.evaluation.questions import Questions, read_questions

DEFAULT_DATA = Path("playground/data/eval")


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Parameters
    ----------
    images : Path | None
        folder of the pictures; None where the question file holds them
    scoring : dict[str, Path]
        files and folders of the scorer, by the names that the benchmark gives them
    """

    questions: Questions
    images: Path | None
    scoring: dict[str, Path]


def find_data(
    benchmark: Benchmark,
    root: Path,
    *,
    question_file: Path | None = None,
    image_folder: Path | None = None,
    annotation_file: Path | None = None,
    without_ocr: bool = False,
    look_at_images: bool = True,
) -> Data:
    """Find and read; raises EvaluationError, which says what is missing and where to get it.

    Parameters
    ----------
    question_file, image_folder, annotation_file : Path | None
        instead of the benchmark's own
    """
    path = question_file or _find(benchmark, root, "question file", benchmark.questions)
    if not path.is_file():
        raise EvaluationError(f"--question-file {path}: there is no such file")
    scoring = {
        name: _find(benchmark, root, name, places) for name, places in benchmark.scoring.items()
    }
    for name, places in benchmark.extras.items():
        found = [root / place for place in places if (root / place).exists()]
        scoring |= {name: found[0]} if found else {}
    if annotation_file is not None:
        if not annotation_file.is_file():
            raise EvaluationError(f"--annotation-file {annotation_file}: there is no such file")
        scoring["annotations"] = annotation_file
    images = None
    if benchmark.images is not None:
        images = image_folder or _find(benchmark, root, "image folder", (benchmark.images,))
    questions = read_questions(path, benchmark.format, without_ocr=without_ocr)
    if images is not None and look_at_images:
        _check_images(benchmark, questions, images)
    return Data(questions, images, scoring)


def _find(benchmark: Benchmark, root: Path, what: str, places: tuple[str, ...]) -> Path:
    for place in places:
        if (root / place).exists():
            return root / place
    looked = " and ".join(str((root / place).absolute()) for place in places)
    raise EvaluationError(
        f"{benchmark.title}: the {what.replace('_', ' ')} is missing: looked for {looked}. "
        f"{_remedy(benchmark)}; --data names the folder that eval.zip is extracted to"
    )


def _remedy(benchmark: Benchmark) -> str:
    return (
        f"Section {benchmark.section!r} of LLaVA's docs/Evaluation.md tells how to get it ({GUIDE})"
    )


def _check_images(benchmark: Benchmark, questions: Questions, folder: Path) -> None:
    names = dict.fromkeys(name for name in questions.images if name is not None)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise EvaluationError(
            f"{benchmark.title}: {len(missing)} of {len(names)} pictures are missing in "
            f"{folder.absolute()}, the first is {missing[0]}. {_remedy(benchmark)}"
        )
