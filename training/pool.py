"""Pictures drawn ahead, as the vision tower sees them, with what covers each patch.

A pool is a folder of memory-mapped arrays; row i comes from seed `first + i` alone, so any part of
it can be drawn again. Scenes of the test split are left out.

    python -m training.pool POOL --count 40000
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from llava_hvp.shapes.drawing import draw, number_boxes, outline, write_number
from llava_hvp.shapes.questions import left_of
from llava_hvp.shapes.scenes import NAMES, Recipe, Scene, Thing, make_scene, split_of

SIDE, PATCH = 168, 14
GRID = SIDE // PATCH
PATCHES = GRID * GRID
BACKGROUND, TEXT, IGNORE = 0, len(NAMES) + 1, 255  # 1 to 24: NAMES
MAX_DIGITS, NO_DIGIT = 3, 10
FIELDS: dict[str, tuple[tuple[int, ...], Any]] = {
    "pixels": ((PATCHES, 3 * PATCH * PATCH), np.uint8),
    "cover": ((PATCHES,), np.uint8),  # which of NAMES, background or text
    "offset": ((PATCHES, 2), np.int8),  # pixels from the patch's centre to its thing's
    "glyph": ((PATCHES,), np.uint8),  # the digit on this patch
    "left": ((PATCHES,), np.uint8),  # on a thing: what is to the left of it, 0 for nothing
    "digits": ((PATCHES, MAX_DIGITS), np.uint8),  # on text: the number, filled up with NO_DIGIT
    "number": ((MAX_DIGITS,), np.uint8),  # of the scene, where all of it can be read
    "present": ((len(NAMES),), np.uint8),  # how many of each
    "seed": ((), np.int64),
    "whole": ((), np.uint8),  # 1: the picture is the scene, all of it visible and not shrunk
}
TEXT_RECIPE = Recipe(things=(0, 2), number=1.0)
FILL = (122, 116, 104)  # what LLaVA pads with: CLIP's mean colour
# The things of a large scene, as one tile of LLaVA-NeXT sees them, or its base tile.
LARGE = ((336, 336), (336, 168), (168, 336), (504, 168), (168, 504), (252, 252), (300, 220))


@dataclass(frozen=True)
class View:
    """A picture of 168 x 168 pixels, and how its pixels come from those of its scene.

    x in the view is `scale[0] * x + shift[0]`.
    """

    scene: Scene
    picture: Image.Image
    scale: tuple[float, float]
    shift: tuple[float, float]
    whole: bool


def plan(seed: int, easy: bool = False) -> tuple[Scene, str]:
    """The scene of a seed, and how a picture shows it: whole, padded, tile or squashed."""
    random = Random(f"view {seed}")
    kind = random.random()
    if easy:
        return make_scene(seed, Recipe(things=(1, 3), busy=0.0)), "whole"
    if kind < 0.68:
        return make_scene(seed, Recipe(busy=random.choice((1.0, 1.0, 1.0, 0.0)))), "whole"
    if kind < 0.76:
        wide = random.choice(((224, 168), (168, 224), (200, 168), (168, 200)))
        return make_scene(seed, Recipe(*wide)), "padded"
    size = random.choice(LARGE)
    most = max(2, round(size[0] * size[1] / SIDE**2 * 3.5))
    scene = make_scene(seed, Recipe(*size, things=(most // 2 + 1, most), number=1.0))
    return scene, "tile" if kind < 0.92 else "squashed"


def make_view(seed: int, easy: bool = False) -> View:
    scene, kind = plan(seed, easy)
    if kind == "tile":
        return _tile(scene, Random(f"tile {seed}"))
    return {"whole": _whole, "padded": _padded, "squashed": _squashed}[kind](scene)


def _whole(scene: Scene) -> View:
    picture = draw(scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return View(scene, picture, (1, 1), (0, 0), True)


def _padded(scene: Scene) -> View:
    """As LLaVA's image_aspect_ratio "pad"."""
    side = max(scene.width, scene.height)
    corner = (side - scene.width) // 2, (side - scene.height) // 2
    square = Image.new("RGB", (side, side), FILL)
    square.paste(draw(scene).resize((scene.width, scene.height), Image.Resampling.BICUBIC), corner)
    scale = SIDE / side
    picture = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return View(scene, picture, (scale, scale), (corner[0] * scale, corner[1] * scale), True)


def _squashed(scene: Scene) -> View:
    scale = SIDE / scene.width, SIDE / scene.height
    picture = draw(scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return View(scene, picture, scale, (0, 0), False)


def _tile(scene: Scene, random: Random) -> View:
    """A window of 168 x 168 pixels, anywhere, a part of it outside at times."""
    low = [-40 if random.random() < 0.3 else 0 for _ in range(2)]
    x = random.randint(low[0], max(0, scene.width - SIDE - low[0]))
    y = random.randint(low[1], max(0, scene.height - SIDE - low[1]))
    picture = Image.new("RGB", (SIDE, SIDE))  # AnyRes pads with black
    picture.paste(draw(scene), (-x, -y))
    return View(scene, picture, (1, 1), (-x, -y), False)


def to_patches(picture: Image.Image) -> np.ndarray:
    """(144, 588) uint8, a row a patch, laid out as the weights of a patch convolution."""
    pixels = np.asarray(picture).reshape(GRID, PATCH, GRID, PATCH, 3)
    return pixels.transpose(0, 2, 4, 1, 3).reshape(PATCHES, -1)


def labels(view: View, extra: list[Scene] | None = None) -> dict[str, np.ndarray]:
    """Every field but pixels and seed; `extra` : scenes of which the number is drawn as well."""
    scene, (sx, sy), (dx, dy) = view.scene, view.scale, view.shift
    half = SIDE // 2  # coverage is counted on every other pixel
    canvas = Image.new("L", (half, half))
    pen = ImageDraw.Draw(canvas)
    for index, thing in enumerate(scene.things, start=1):
        points = [((sx * x + dx) / 2, (sy * y + dy) / 2) for x, y in outline(thing)]
        pen.polygon(points, fill=index)
    first = count = len(scene.things) + 1
    numbers = []  # (first index, boxes, digits)
    for written in [scene, *(extra or [])]:
        boxes = [
            (sx * left + dx, sy * top + dy, sx * right + dx, sy * bottom + dy)
            for left, top, right, bottom in number_boxes(written)
        ]
        for index, box in enumerate(boxes, start=count):
            pen.rectangle([box[0] / 2, box[1] / 2, (box[2] - 1) / 2, (box[3] - 1) / 2], fill=index)
        if written.number:
            numbers.append((count, boxes, written.number.digits))
        count += len(boxes)
    cells = np.asarray(canvas).reshape(GRID, PATCH // 2, GRID, PATCH // 2)
    shares = np.stack([(cells == i).mean((1, 3)).ravel() for i in range(count)], 1)
    things = shares[:, 1:first]
    text = shares[:, first:].sum(1)
    table = {name: np.zeros(shape, kind) for name, (shape, kind) in FIELDS.items() if shape}
    table["glyph"][:] = table["left"][:] = table["digits"][:] = IGNORE
    table["number"][:] = NO_DIGIT
    cover = table["cover"]
    anything = 1 - shares[:, 0]
    cover[(anything > 0.04) & (anything < 0.2)] = IGNORE
    middles = (np.stack(np.meshgrid(range(GRID), range(GRID)), -1).reshape(-1, 2) + 0.5) * PATCH
    for index, thing in enumerate(scene.things):
        mine = (things[:, index] >= 0.2) & (things[:, index] >= text)
        mine &= things[:, index] >= things.max(1)
        cover[mine] = NAMES.index(thing.name) + 1
        centre = np.array((sx * thing.x + dx, sy * thing.y + dy))
        table["offset"][mine] = np.clip(centre - middles[mine], -60, 60).astype(np.int8)
        left = left_of(scene, thing)
        if view.whole and left != "unclear":
            beside = NAMES.index(left.name) + 1 if isinstance(left, Thing) else 0
            table["left"][mine] = beside
        visible = 0 <= centre[0] < SIDE and 0 <= centre[1] < SIDE
        table["present"][NAMES.index(thing.name)] += visible
    on_text = (text >= 0.2) & (text > things.max(1, initial=0))
    cover[on_text] = TEXT
    for start, boxes, digits in numbers:
        each = shares[:, start : start + len(boxes)]
        mine = on_text & (each.sum(1) > 0.6 * text)
        values = np.array([int(digit) for digit in digits], np.uint8)
        legible = boxes[0][3] - boxes[0][1] > 11 and sx > 0.6
        if legible:
            # Two digits that share a patch evenly have no label of their own.
            clear = mine & (each.max(1) > 0.65 * text)
            table["glyph"][clear] = values[each.argmax(1)[clear]]
        inside = boxes[0][0] >= 0 and boxes[-1][2] <= SIDE
        if legible and inside and boxes[0][1] >= 0 and boxes[0][3] <= SIDE:
            table["digits"][mine] = NO_DIGIT
            table["digits"][mine, : len(values)] = values
            if start == first:
                table["number"][: len(values)] = values
    table["whole"] = np.uint8(view.whole)
    return table


def more_numbers(view: View, seed: int) -> tuple[View, list[Scene]]:
    """The view with up to seven more numbers in it, the more to learn reading from."""
    random = Random(f"numbers {seed}")
    recipe = Recipe(number=1.0, things=(0, 0), digit_height=(14, 24))
    taken = [(t.x, t.y, t.size, t.size) for t in view.scene.things]
    if own := view.scene.number:
        taken.append((own.x, own.y, own.width, own.height))
    extra: list[Scene] = []
    picture = view.picture.copy()
    for _ in range(16):
        scene = make_scene(random.getrandbits(40), recipe)
        number = scene.number
        if number is None or len(extra) == 7:
            break
        box = (number.x, number.y, number.width, number.height)
        if all(
            abs(box[0] - o[0]) > (box[2] + o[2]) / 2 + 9
            or abs(box[1] - o[1]) > (box[3] + o[3]) / 2 + 9
            for o in taken
        ):
            taken.append(box)
            extra.append(scene)
            write_number(picture, scene, 1)
    return replace(view, picture=picture), extra


def open_pool(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS}


def draw_pool(folder: Path, count: int, first: int, easy: bool = False, text: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", dtype=kind, shape=(count, *shape)
        )
        for name, (shape, kind) in FIELDS.items()
    }
    row, seed, start = 0, first, time.time()
    while row < count:
        view = _whole(make_scene(seed, TEXT_RECIPE)) if text else make_view(seed, easy)
        if split_of(view.scene) == "train":
            extra: list[Scene] = []
            if text:
                view, extra = more_numbers(view, seed)
            for name, value in labels(view, extra).items():
                arrays[name][row] = value
            arrays["pixels"][row] = to_patches(view.picture)
            arrays["seed"][row] = seed
            row += 1
            if row % 5000 == 0:
                print(f"{row} pictures in {time.time() - start:.0f} s", flush=True)
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--easy", action="store_true", help="plain backgrounds, 1 to 3 things")
    parser.add_argument("--text", action="store_true", help="several numbers to a picture")
    options = parser.parse_args()
    draw_pool(options.folder, options.count, options.first, options.easy, options.text)


if __name__ == "__main__":
    main()
