"""Which pictures held-out questions are about: one tile, or details that need AnyRes."""

from __future__ import annotations

from collections.abc import Iterator

from llava_hvp.shapes.questions import Question, for_training, held_out
from llava_hvp.shapes.scenes import Recipe, Scene

# Width and height of pictures larger than a tile.
DETAIL_SIZES = ((336, 168), (168, 336), (336, 336), (300, 240), (240, 320), (300, 160), (150, 310))


def detail_recipe(size: tuple[int, int]) -> Recipe:
    """Things and digits that vanish when the picture is shrunk to one tile."""
    return Recipe(*size, things=(3, 6), size=(22, 40), number=0.85)


EXAMS = {
    "plain": (Recipe(),),
    "detail": tuple(detail_recipe(size) for size in DETAIL_SIZES),
}


def exam_for(checkpoint: str) -> str:
    """The exam that a checkpoint of this name was trained for."""
    return "detail" if "next" in checkpoint else "plain"


def exam(name: str, count: int) -> Iterator[tuple[Scene, Question]]:
    """`count` held-out questions, shared evenly by the exam's kinds of picture.

    The same for the same arguments, on every machine.
    """
    for share, recipe in _shares(name, count):
        yield from held_out(share, recipe)


def lessons(name: str, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """`count` pictures to train on with their questions, shared evenly as in `exam`."""
    for share, recipe in _shares(name, count):
        yield from for_training(share, recipe)


def _shares(name: str, count: int) -> Iterator[tuple[int, Recipe]]:
    recipes = EXAMS[name]
    for number, recipe in enumerate(recipes):
        yield (count + len(recipes) - 1 - number) // len(recipes), recipe
