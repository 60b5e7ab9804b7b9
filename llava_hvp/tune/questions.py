"""What is asked about which pictures; nobody has to know the answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.errors import OptionError, PictureError
from llava_hvp.evaluation.benchmarks import JSONL
from llava_hvp.evaluation.questions import read_questions
from llava_hvp.lazy import torch
from llava_hvp.shapes.exams import exam

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

# Where only pictures are given. Of things, places, counts, colours, text, and one of everything:
# what a picture is asked is not known, and each kind leans on other patches.
GENERAL = (
    "What is the main thing in this picture?",
    "What is written in this picture? Answer with the words, or with none.",
    "How many people or animals are in this picture?",
    "What is in the background of this picture?",
    "What colours stand out in this picture?",
    "What is on the left side of this picture?",
    "What is the smallest thing that you can name in this picture?",
    "Describe this picture in one sentence.",
)
PLOTS = ("table", "curve")
EACH = 2  # general questions about a picture
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
IMAGE = "<image>"


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Parameters
    ----------
    picture : str
        its name, the same for all questions about it
    open : Callable[[], Any]
        gives it, as PIL has it
    """

    picture: str
    text: str
    open: Callable[[], Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Halves:
    """Questions of which one half chooses and the other judges; no picture is in both."""

    choosing: tuple[Asked, ...]
    judging: tuple[Asked, ...]

    @classmethod
    def of(cls, asked: Sequence[Asked], seed: int = 0) -> Halves:
        """By picture, drawn with a seed; raises OptionError for fewer than two pictures."""
        pictures = sorted({each.picture for each in asked})
        if len(pictures) < 2:
            raise OptionError(
                f"{len(pictures)} picture: half of them choose and the other half judge: give at "
                "least two, better a hundred"
            )
        random.Random(seed).shuffle(pictures)
        first = set(pictures[: (len(pictures) + 1) // 2])
        return cls(
            tuple(each for each in asked if each.picture in first),
            tuple(each for each in asked if each.picture not in first),
        )


def drawn(exam_name: str, count: int) -> list[Asked]:
    """Questions about the drawn pictures that the shipped checkpoints know, without answers."""
    from llava_hvp.shapes.drawing import draw

    asked: list[Asked] = []
    before, number = None, 0
    for scene, question in exam(exam_name, count):
        number += scene is not before and scene != before
        before = scene
        asked.append(Asked(f"{number:06}", question.text, partial(draw, scene)))
    return asked


def in_folder(
    images: Path,
    questions: Path | None,
    most: int | None = None,
    seed: int = 0,
    plots: str = "",
) -> list[Asked]:
    """Questions about pictures of a folder.

    Parameters
    ----------
    questions : Path | None
        LLaVA's JSON lines, each with `image` and `text`; None asks `GENERAL` ones in turn
    most : int | None
        questions at most, drawn with the seed
    plots : str
        what the names of plots of an earlier run begin with, which are no pictures of the user's

    Raises
    ------
    OptionError
        no such folder, or no picture in it
    EvaluationError
        no question file
    """
    if not images.is_dir():
        raise OptionError(f"--images {images}: no such folder")
    if questions is None:
        found = list(_general(images, seed, plots))
    elif not questions.is_file():
        raise OptionError(f"--questions {questions}: no such file")
    else:
        items = read_questions(questions, JSONL).items
        found = [_asked(images, str(item["image"]), str(item["text"])) for item in items]
    if not found:
        raise OptionError(f"--images {images}: no picture in it ({', '.join(SUFFIXES)})")
    if most is not None and len(found) > most:
        places = sorted(random.Random(seed).sample(range(len(found)), most))
        found = [found[place] for place in places]
    return found


def _general(images: Path, seed: int, plots: str) -> Iterator[Asked]:
    files = [p for p in sorted(images.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    files = [p for p in files if not (plots and p.name in (f"{plots}-{n}.png" for n in PLOTS))]
    # So that a draw of some asks of every kind.
    turn = random.Random(seed).randrange(len(GENERAL))
    for number, file in enumerate(files):
        for each in range(EACH):
            text = GENERAL[(turn + number * EACH + each) % len(GENERAL)]
            yield _asked(images, file.relative_to(images).as_posix(), text)


def _asked(images: Path, name: str, text: str) -> Asked:
    path = images / name
    if not path.is_file():
        raise OptionError(f"--questions: {name} is not in {images}: give --images its folder")
    # A question of LLaVA's may hold the mark of its picture.
    text = text.replace(IMAGE, "").strip()

    def opened() -> Any:
        from PIL import Image

        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise PictureError(f"{path} is no picture that can be read: {error}") from error

    return Asked(name, text, opened)


@dataclass(frozen=True)
class Sheet:
    """Questions that make a batch without padding.

    Parameters
    ----------
    ids : torch.Tensor
        (B, L) int64, a prompt in each row
    asked : tuple[Asked, ...]
        one for each row
    """

    ids: torch.Tensor
    asked: tuple[Asked, ...]

    def pictures(self) -> list[Any]:
        """PIL pictures, one for each row."""
        return [each.open() for each in self.asked]


def sheets_of(opened: Checkpoint, asked: Sequence[Asked], batch: int) -> list[Sheet]:
    """All questions, those of a sheet with prompts of one length.

    Where the model cuts pictures into tiles, with pictures of one size too: stock LLaVA fills
    others up behind their end, where the answer begins.
    """
    groups: dict[object, list[tuple[torch.Tensor, Asked]]] = {}
    for each in asked:
        ids = opened.prompt(each.text)
        size = each.open().size if opened.cuts_tiles else None
        groups.setdefault((len(ids), size), []).append((ids, each))
    parts = [
        group[start : start + batch]
        for group in groups.values()
        for start in range(0, len(group), batch)
    ]
    return [
        Sheet(torch.stack([ids for ids, _ in part]), tuple(each for _, each in part))
        for part in parts
    ]
