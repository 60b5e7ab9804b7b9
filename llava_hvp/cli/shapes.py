"""`llava-hvp shapes`: the trained checkpoints that come along, with pictures and questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.cli.arguments import at_least
from llava_hvp.cli.extras import need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.files import write_whole
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.exams import exam, exam_for, lessons
from llava_hvp.shapes.questions import Question
from llava_hvp.shapes.scenes import Scene

EXAMPLES = ("llava-hvp shapes shapes",)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "shapes",
        "write a small trained LLaVA that is shipped, with pictures and questions",
        "Two LLaVAs of 8 MB each, which answer about drawn shapes on a CPU: to try "
        "everything else with.",
        EXAMPLES,
    )
    parser.add_argument("folder", type=Path, help="where to; one that may be there already")
    parser.add_argument(
        "--model", choices=list_checkpoints(), action="append", help="all of them by default"
    )
    parser.add_argument("--questions", type=int, default=24, help="for each model, 24 by default")
    parser.add_argument(
        "--training",
        type=int,
        default=0,
        metavar="N",
        help="also training.json, N pictures to train on in LLaVA's own format",
    )
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class ShapesSettings:
    """What `llava-hvp shapes` writes.

    Parameters
    ----------
    folder : Path
        where to
    models : tuple[str, ...]
        names of shipped checkpoints
    questions : int
        of each
    training : int
        pictures to train on, of each
    """

    folder: Path
    models: tuple[str, ...]
    questions: int
    training: int = 0


def parse(args: argparse.Namespace) -> ShapesSettings:
    """The settings; raises OptionError."""
    need("testing", "PIL", "numpy")
    at_least(args, "questions", 1)
    at_least(args, "training", 0)
    models = tuple(args.model or list_checkpoints())
    return ShapesSettings(args.folder, models, args.questions, args.training)


def run(settings: ShapesSettings) -> int:
    """Write, and say what to type next; the exit code."""
    for name in settings.models:
        try:
            path = checkpoint(settings.folder, name)
            pictures = write_exam(path, exam(exam_for(name), settings.questions))
            if settings.training:
                write_lessons(path, lessons(exam_for(name), settings.training))
        except OSError as error:
            raise OptionError(f"{settings.folder}: cannot be written: {error}") from error
        say(
            f"wrote {path} with {pictures} pictures; to try it:\n"
            f"  python -m llava.serve.cli --model-path {path} "
            f"--image-file {path}/pictures/1.png --device cpu --prune-method hivtp"
        )
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def write_exam(folder: Path, asked: Iterable[tuple[Scene, Question]]) -> int:
    """Write pictures and questions.jsonl as LLaVA's eval modules read them; how many pictures.

    The field `answer` has what is right.
    """
    from llava_hvp.shapes.drawing import draw

    (folder / "pictures").mkdir(exist_ok=True)
    names: dict[Scene, str] = {}
    lines = []
    for number, (scene, question) in enumerate(asked, start=1):
        if scene not in names:
            names[scene] = f"{len(names) + 1}.png"
            draw(scene).save(folder / "pictures" / names[scene])
        line = {
            "question_id": number,
            "image": names[scene],
            "text": question.text,
            "category": question.task,
            "answer": question.answer,
        }
        lines.append(json.dumps(line) + "\n")
    write_whole(folder / "questions.jsonl", "".join(lines).encode())
    return len(names)


def write_lessons(folder: Path, lessons: Iterable[tuple[Scene, list[Question]]]) -> None:
    """Write pictures and training.json as `llava.train.train` reads them."""
    from llava_hvp.shapes.drawing import draw

    (folder / "training").mkdir(exist_ok=True)
    samples = []
    for number, (scene, questions) in enumerate(lessons, start=1):
        name = f"training/{number}.png"
        draw(scene).save(folder / name)
        turns: list[dict[str, str]] = []
        for question in questions:
            mark = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": f"{mark}{question.text}"})
            turns.append({"from": "gpt", "value": question.answer})
        samples.append({"id": str(number), "image": name, "conversations": turns})
    write_whole(folder / "training.json", json.dumps(samples).encode())
