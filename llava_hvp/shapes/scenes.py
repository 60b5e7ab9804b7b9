"""What is in a picture: shapes of a colour at a place, and a number; plain data from a seed.

Only `random.Random` is used, seeded by text: it gives the same scenes on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
# A centre this near (as a share of the picture's side) to a border between places has no place.
BORDER = 0.05
TEST_SHARE = 10  # one scene of so many is held out


@dataclass(frozen=True)
class Thing:
    """A coloured shape. x, y : centre in pixels; size : pixels across; angle : degrees."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Number:
    """A few digits in a row. x, y : centre in pixels; height : pixels of a digit."""

    digits: str
    x: float
    y: float
    height: float

    @property
    def width(self) -> float:
        """Pixels from the first digit's left to the last one's right, about."""
        return 0.68 * self.height * len(self.digits)


@dataclass(frozen=True)
class Scene:
    """A picture's content. width, height : pixels; style : seed of background, hues and clutter.

    Parameters
    ----------
    busy : float
        0 (plain background, no distractors) to 1
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    number: Number | None
    style: int
    busy: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """What a scene may hold: ranges, both ends included, sizes in pixels."""

    width: int = 168
    height: int = 168
    things: tuple[int, int] = (2, 6)
    size: tuple[float, float] = (26, 46)
    number: float = 0.7  # share of scenes with a number
    digits: tuple[int, int] = (2, 3)
    digit_height: tuple[float, float] = (16, 22)
    busy: float = 1.0


def make_scene(seed: int, recipe: Recipe | None = None) -> Scene:
    """The scene of a seed; equal arguments give equal scenes."""
    recipe = recipe or Recipe()
    random = Random(f"scene {seed}")
    number = _number(random, recipe) if random.random() < recipe.number else None
    # Half of the scenes repeat a shape, or there would be little to count.
    favourite = random.choice(SHAPES) if random.random() < 0.5 else None
    things: list[Thing] = []
    wanted = random.randint(*recipe.things)
    for _ in range(30 * wanted):
        if len(things) == wanted:
            break
        thing = _thing(random, recipe, things, favourite)
        if _is_free(thing, things, number, recipe):
            things.append(thing)
    return Scene(
        recipe.width,
        recipe.height,
        tuple(things),
        number,
        style=random.getrandbits(32),
        busy=recipe.busy,
    )


def place_of(scene: Scene, thing: Thing) -> str | None:
    """The place of a thing by thirds of the picture; None near a border between places."""
    row, column = _third(thing.y / scene.height), _third(thing.x / scene.width)
    return None if row is None or column is None else PLACES[row][column]


def split_of(scene: Scene) -> str:
    """ "train" or "test", by the content alone: which things are in which ninth, which digits.

    Scenes that differ in nothing but style, sizes or a few pixels are in the same split, so no
    test scene has a twin in training.
    """
    cells = sorted(
        (
            thing.name,
            min(2, int(3 * thing.y / scene.height)),
            min(2, int(3 * thing.x / scene.width)),
        )
        for thing in scene.things
    )
    digits = scene.number.digits if scene.number else ""
    key = hashlib.sha256(repr((cells, digits)).encode()).digest()
    return "test" if int.from_bytes(key[:8], "big") % TEST_SHARE == 0 else "train"


def _third(share: float) -> int | None:
    near = min(abs(share - 1 / 3), abs(share - 2 / 3))
    return None if near < BORDER else min(2, int(3 * share))


def _number(random: Random, recipe: Recipe) -> Number:
    digits = "".join(random.choice("0123456789") for _ in range(random.randint(*recipe.digits)))
    height = random.uniform(*recipe.digit_height)
    number = Number(digits, 0, 0, height)
    half = number.width / 2 + 5
    return Number(
        digits,
        random.uniform(half, recipe.width - half),
        random.uniform(height / 2 + 5, recipe.height - height / 2 - 5),
        height,
    )


def _thing(random: Random, recipe: Recipe, others: list[Thing], favourite: str | None) -> Thing:
    shape = favourite if favourite and random.random() < 0.55 else random.choice(SHAPES)
    size = random.uniform(*recipe.size)
    # Squares and triangles stay recognisable: a square on its corner would be a diamond.
    angle = random.uniform(-12, 12)
    half = size / 2 + 3
    x = random.uniform(half, recipe.width - half)
    y = random.uniform(half, recipe.height - half)
    if others and random.random() < 0.4:  # level with another one: what is to the left of it?
        y = min(max(random.choice(others).y + random.uniform(-7, 7), half), recipe.height - half)
    return Thing(shape, random.choice(COLOURS), x, y, size, angle)


def _is_free(thing: Thing, others: list[Thing], number: Number | None, recipe: Recipe) -> bool:
    gap = 5
    for other in others:
        apart = (thing.size + other.size) / 2 + gap
        if abs(thing.x - other.x) < apart and abs(thing.y - other.y) < apart:
            return False
    if number is None:
        return True
    apart_x = (thing.size + number.width) / 2 + gap + 3
    apart_y = (thing.size + number.height) / 2 + gap + 3
    return abs(thing.x - number.x) >= apart_x or abs(thing.y - number.y) >= apart_y
