"""Questions on a scene with their answers, and the held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from llava_hvp.shapes.scenes import (
    NAMES,
    SHAPES,
    Recipe,
    Scene,
    Thing,
    make_scene,
    place_of,
    split_of,
)

TASKS = ("existence", "count", "colour", "place", "left", "digits")
SUFFIX = "\nAnswer the question using a single word or phrase."
MOST = 4  # of one kind, to count

# The first is what the held-out questions mostly say; a person may type any.
WORDINGS: dict[str, tuple[str, ...]] = {
    "existence": (
        "Is there {a} {what}?",
        "Is there {a} {what} in the image?",
        "Is there {a} {what} in the picture?",
        "Can you see {a} {what}?",
        "Does the image contain {a} {what}?",
        "Do you see {a} {what} in this picture?",
    ),
    "count": (
        "How many {what}s are there?",
        "How many {what}s are in the image?",
        "How many {what}s are there in the picture?",
        "How many {what}s do you see?",
        "How many {what}s can you see in the image?",
        "Count the {what}s.",
    ),
    "colour": (
        "What colour is the {what}?",
        "What color is the {what}?",
        "Which colour is the {what}?",
        "What is the color of the {what}?",
        "What is the colour of the {what} in the picture?",
    ),
    "place": (
        "Where is the {what}?",
        "Where is the {what} in the image?",
        "In which part of the picture is the {what}?",
        "Where in the picture is the {what}?",
        "Where do you see the {what}?",
    ),
    "left": (
        "What is to the left of the {what}?",
        "What is left of the {what}?",
        "Which object is to the left of the {what}?",
        "What object is on the left of the {what}?",
        "What do you see to the left of the {what}?",
    ),
    "digits": (
        "Which digits are written?",
        "What digits are written in the image?",
        "Which number is written?",
        "What number is written in the picture?",
        "What is the number in the image?",
        "Read the number.",
        "Read the digits.",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer.

    Parameters
    ----------
    text : str
        as a user types it
    answer : str
        what is right, case aside
    subject : str
        what it asks for
    """

    task: str
    text: str
    answer: str
    subject: str


def questions_of(scene: Scene, random: Random, task: str, most: int) -> list[Question]:
    """Up to `most` different questions of one task, in the first wording."""
    found = list(dict.fromkeys(_MAKERS[task](scene, random)))
    return random.sample(found, min(most, len(found)))


def reword(question: Question, random: Random) -> Question:
    """A question as another person would type the same."""
    what = question.subject
    wording = WORDINGS[question.task][0]
    if random.random() < 0.7:
        wording = random.choice(WORDINGS[question.task])
    text = wording.format(a=article(what), what=what)
    chance = random.random()
    if chance < 0.1:
        text = text.lower()
    elif chance < 0.15:
        text = text.lower().rstrip("?.")
    if random.random() < 0.25:
        text += SUFFIX
    return replace(question, text=text)


def is_right(answer: str, question: Question) -> bool:
    """Whether an answer is the right one, but for case, space and a full stop."""
    return answer.strip().rstrip(".").lower() == question.answer.lower()


def held_out(
    count: int, recipe: Recipe | None = None, first_seed: int = 1_000_000_000
) -> Iterator[tuple[Scene, Question]]:
    """`count` questions on scenes of the test split, the tasks in turn, at most two on a scene."""
    seed, given = first_seed, 0
    while given < count:
        scene = make_scene(seed, recipe)
        random = Random(f"held out {seed}")
        seed += 1
        if split_of(scene) != "test":
            continue
        for _ in range(2):
            questions = questions_of(scene, random, TASKS[given % len(TASKS)], 1)
            if not questions or given == count:
                break
            yield scene, reword(questions[0], random)
            given += 1


def for_training(
    count: int, recipe: Recipe | None = None, first_seed: int = 0
) -> Iterator[tuple[Scene, list[Question]]]:
    """`count` scenes of the training split, each with a question of every task that fits it."""
    seed, given = first_seed, 0
    while given < count:
        scene = make_scene(seed, recipe)
        random = Random(f"for training {seed}")
        seed += 1
        if split_of(scene) == "test":
            continue
        asked = [q for task in TASKS for q in questions_of(scene, random, task, 1)]
        yield scene, [reword(question, random) for question in random.sample(asked, len(asked))]
        given += 1


def left_of(scene: Scene, thing: Thing) -> Thing | str | None:
    """What is to the left of a thing: the one thing, None for nothing, "unclear" otherwise.

    Level is what lies at most a third of an average size higher or lower; what is on the left,
    neither level nor clearly in another row, makes it unclear, as do two things.
    """
    level: list[Thing] = []
    unclear = False
    for other in scene.things:
        if other is thing or other.x > thing.x - 4:
            continue
        apart, mean = abs(other.y - thing.y), (other.size + thing.size) / 2
        beside = other.x + other.size / 2 < thing.x - thing.size / 2 + 2
        if apart <= mean / 3 and beside:
            level.append(other)
        elif apart < 0.8 * mean:
            unclear = True
    number = scene.number
    if number and number.x < thing.x and abs(number.y - thing.y) < (number.height + thing.size) / 2:
        unclear = True
    if unclear or len(level) > 1:
        return "unclear"
    return level[0] if level else None


def article(what: str) -> str:
    """a or an."""
    return "an" if what[:1] in tuple("aeiou") else "a"


def _ask(task: str, what: str, answer: str) -> Question:
    text = WORDINGS[task][0].format(a=article(what), what=what)
    return Question(task, text, answer, what)


def _existence(scene: Scene, random: Random) -> Iterator[Question]:
    """As many yes as no; half of the no in POPE's manner: colour and shape are there, not together.

    One question in five asks for a shape alone.
    """
    present = {thing.name for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    colours = {thing.colour for thing in scene.things}
    absent = [name for name in NAMES if name not in present]
    adversarial = [n for n in absent if n.split()[0] in colours and n.split()[1] in shapes]
    pool = {
        "yes": sorted(present),
        "adversarial": adversarial or absent,
        "random": absent,
    }
    kinds = ["yes", "yes", "adversarial", "random"]
    # Which comes first, and so which is asked where one is, is a fair draw.
    for kind in random.sample(kinds, len(kinds)):
        if random.random() < 0.2:
            some = sorted(shapes) if kind == "yes" else [s for s in SHAPES if s not in shapes]
        else:
            some = pool[kind]
        if some:
            yield _ask("existence", random.choice(some), "Yes" if kind == "yes" else "No")


def _count(scene: Scene, random: Random) -> Iterator[Question]:
    for shape in SHAPES:
        count = sum(thing.shape == shape for thing in scene.things)
        # Absent shapes are many: without a limit most answers would be 0.
        if count <= MOST and (count or random.random() < 0.35):
            yield _ask("count", shape, str(count))


def _colour(scene: Scene, random: Random) -> Iterator[Question]:
    for thing in scene.things:
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            yield _ask("colour", thing.shape, thing.colour.capitalize())


def _place(scene: Scene, random: Random) -> Iterator[Question]:
    for thing in _unique(scene):
        place = place_of(scene, thing)
        if place:
            yield _ask("place", thing.name, place.capitalize())


def _left(scene: Scene, random: Random) -> Iterator[Question]:
    for thing in _unique(scene):
        left = left_of(scene, thing)
        if isinstance(left, Thing):
            yield _ask("left", thing.name, left.name.capitalize())


def _digits(scene: Scene, random: Random) -> Iterator[Question]:
    if scene.number:
        yield _ask("digits", "", scene.number.digits)


def _unique(scene: Scene) -> list[Thing]:
    names = [thing.name for thing in scene.things]
    return [thing for thing in scene.things if names.count(thing.name) == 1]


_MAKERS: dict[str, Callable[[Scene, Random], Iterator[Question]]] = {
    "existence": _existence,
    "count": _count,
    "colour": _colour,
    "place": _place,
    "left": _left,
    "digits": _digits,
}
