"""From a scene to a picture: busy background, clutter, the things, the number.

Everything random comes from the scene's own style, through generators whose numbers are the same
on every machine. Digits are small masks that come with this package (`digits.png`), so no font of
the system and no version of FreeType matters.
"""

from __future__ import annotations

import colorsys
import functools
import math
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from llava_hvp.shapes.scenes import Scene, Thing

Colour = tuple[int, int, int]
Point = tuple[float, float]

# Hues in degrees, with the least and most saturation and brightness. They hold the colours that
# go by these names in HTML and leave a gap between neighbours.
_HUES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-10, 7), (0.78, 1), (0.72, 1)),
    "orange": ((22, 39), (0.85, 1), (0.9, 1)),
    "yellow": ((50, 61), (0.75, 1), (0.9, 1)),
    "green": ((95, 145), (0.65, 1), (0.45, 0.95)),
    "blue": ((205, 241), (0.7, 1), (0.6, 1)),
    "purple": ((266, 301), (0.6, 1), (0.45, 0.85)),
}
# digits.png: a row for each typeface, a column for each digit; drawn by Pillow with its own Aileron
# (CC0) and five styles of DejaVu (free to embed), so that nobody needs the fonts.
_CELL = (40, 56)
TYPEFACES = 6


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, (width, height) times its scale.

    Small scenes are drawn at 1, 2 or 3 times their size, as pictures that an image processor will
    shrink, with the smooth edges that brings.
    """
    random = Random(f"style {scene.style}")
    scale = random.choice((1, 2, 2, 3)) if max(scene.width, scene.height) <= 200 else 1
    picture = _background(scene, scale, random)
    pen = ImageDraw.Draw(picture)
    _clutter(pen, scene, scale, random)
    _draw_things(pen, scene, scale, random)
    if scene.busy and random.random() < 0.3:
        for _ in range(random.randint(1, 2)):
            _line(pen, scene, scale, random, width=max(1, scale // 2))
    if scene.number:
        write_number(picture, scene, scale)
    return picture


def draw_on(picture: Image.Image, scene: Scene) -> None:
    """Draw a scene's things and number on a picture of your own, a whole multiple of its size."""
    scale = picture.width // scene.width
    _draw_things(ImageDraw.Draw(picture), scene, scale, Random(f"style {scene.style}"))
    if scene.number:
        write_number(picture, scene, scale)


def outline(thing: Thing, random: Random | None = None) -> list[Point]:
    """The corners of a thing in pixels of its scene (a circle has 40); proportions by `random`."""
    if thing.shape == "circle":
        corners = [_polar(360 * i / 40, 0.5) for i in range(40)]
    elif thing.shape == "square":
        corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    elif thing.shape == "triangle":
        height = random.uniform(0.84, 1.0) if random else 0.92
        corners = [(0, -height / 2), (0.5, height / 2), (-0.5, height / 2)]
    else:
        inner = random.uniform(0.2, 0.26) if random else 0.23
        corners = [_polar(36 * i - 90, inner if i % 2 else 0.53) for i in range(10)]
    cosine, sine = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        (
            thing.x + thing.size * (cosine * x - sine * y),
            thing.y + thing.size * (sine * x + cosine * y),
        )
        for x, y in corners
    ]


def _polar(degrees: float, radius: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _hsv(hue: float, saturation: float, brightness: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def _tint(colour: str, random: Random) -> Colour:
    return _hsv(*(random.uniform(*limits) for limits in _HUES[colour]))


def _muted(random: Random) -> Colour:
    return _hsv(random.uniform(0, 360), random.uniform(0, 0.28), random.uniform(0.12, 1))


def _grey(random: Random) -> Colour:
    level = random.randint(0, 255)
    return level, level, level


def _background(scene: Scene, scale: int, random: Random) -> Image.Image:
    size = scene.width * scale, scene.height * scale
    kind = random.choice(("plain", "gradient", "gradient", "stripes", "checks", "clouds", "clouds"))
    first, second = _muted(random), _muted(random)
    # The older generator's numbers are frozen for good by numpy's policy.
    noise = np.random.RandomState(scene.style)
    if not scene.busy:
        kind = "plain"
    if kind == "gradient":
        ends = np.array([[first, second], [_muted(random), second]], np.uint8)
        picture = Image.fromarray(ends).resize(size, Image.Resampling.BILINEAR)
    elif kind == "clouds":
        cells = random.randint(3, 14)
        shares = noise.randint(0, 256, (cells, cells, 1)) / 255
        low = np.array(first) * shares + np.array(second) * (1 - shares)
        picture = Image.fromarray(low.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    else:
        picture = Image.new("RGB", size, first)
        # Like the first, so that stripes do not drown the things.
        red, green, blue = (round(0.6 * a + 0.4 * b) for a, b in zip(first, second, strict=True))
        second = red, green, blue
        pen, step = ImageDraw.Draw(picture), random.randint(6, 24) * scale
        if kind == "stripes":
            lean = random.choice((0, 0, 1, -1)) * size[1]
            flat = random.random() < 0.5 and not lean
            for start in range(-abs(lean), max(size) + abs(lean), 2 * step):
                if flat:
                    pen.rectangle((0, start, size[0], start + step), fill=second)
                else:
                    top, bottom = start, start + lean
                    pen.polygon(
                        ((top, 0), (top + step, 0), (bottom + step, size[1]), (bottom, size[1])),
                        fill=second,
                    )
        elif kind == "checks":
            for row in range(size[1] // step + 1):
                for column in range(row % 2, size[0] // step + 1, 2):
                    corner = column * step, row * step
                    pen.rectangle((*corner, corner[0] + step - 1, corner[1] + step - 1), second)
    if scene.busy and random.random() < 0.5:
        grain = random.randint(4, 24)
        specks = noise.randint(-grain, grain + 1, (size[1] // scale, size[0] // scale, 1))
        specks = specks.repeat(scale, 0).repeat(scale, 1)
        grainy = np.clip(np.asarray(picture).astype(np.int16) + specks, 0, 255)
        picture = Image.fromarray(grainy.astype(np.uint8))
    return picture


def _clutter(pen: ImageDraw.ImageDraw, scene: Scene, scale: int, random: Random) -> None:
    """Grey lines, dots and small marks, and a few coloured specks: none is asked for."""
    area = scene.width * scene.height / 168**2
    for _ in range(round(scene.busy * area * random.randint(0, 12))):
        x, y = random.uniform(0, scene.width) * scale, random.uniform(0, scene.height) * scale
        r, fill = random.uniform(1.5, 4.5) * scale, _grey(random)
        kind = random.choice(("line", "dot", "dot", "plus", "frame", "arc"))
        if kind == "line":
            _line(pen, scene, scale, random, width=random.randint(1, 2) * scale)
        elif kind == "dot":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "plus":
            pen.line((x - r, y, x + r, y), fill=fill, width=scale)
            pen.line((x, y - r, x, y + r), fill=fill, width=scale)
        elif kind == "frame":
            pen.rectangle((x - r, y - r, x + r, y + r), outline=fill, width=scale)
        else:
            pen.arc((x - r, y - r, x + r, y + r), 0, random.randint(90, 300), fill, scale)
    if scene.busy and random.random() < 0.3:
        for _ in range(random.randint(1, 4)):
            x, y = random.uniform(0, scene.width) * scale, random.uniform(0, scene.height) * scale
            r = random.uniform(1, 2.2) * scale
            pen.ellipse(
                (x - r, y - r, x + r, y + r), fill=_tint(random.choice(list(_HUES)), random)
            )


def _line(
    pen: ImageDraw.ImageDraw, scene: Scene, scale: int, random: Random, *, width: int
) -> None:
    ends = [random.uniform(0, side) * scale for side in (scene.width, scene.height) * 2]
    pen.line(ends, fill=_grey(random), width=width)


def _draw_things(pen: ImageDraw.ImageDraw, scene: Scene, scale: int, random: Random) -> None:
    for thing in scene.things:
        _draw_thing(pen, thing, scale, random)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, scale: int, random: Random) -> None:
    fill = _tint(thing.colour, random)
    edge = random.choice(((0, 0, 0), (255, 255, 255), _grey(random)))
    width = random.randint(1, 2) * scale if random.random() < 0.25 else 0
    if thing.shape == "circle":
        box = [
            scale * (centre + side * thing.size / 2)
            for side in (-1, 1)
            for centre in (thing.x, thing.y)
        ]
        pen.ellipse(box, fill=fill, outline=edge if width else None, width=width)
        return
    corners = [(scale * x, scale * y) for x, y in outline(thing, random)]
    pen.polygon(corners, fill=fill)
    if width:
        pen.line([*corners, corners[0], corners[1]], fill=edge, width=width, joint="curve")


def number_boxes(scene: Scene, scale: int = 1) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each digit in pixels of the scene times `scale`."""
    return [
        (left, top, left + mask.width, top + mask.height)
        for left, top, mask in _layout(scene, scale, _number_style(scene))
    ]


def _number_style(scene: Scene) -> Random:
    # Its own stream: where the digits are can be told without drawing all the rest.
    return Random(f"number {scene.style}")


def _layout(scene: Scene, scale: int, random: Random) -> list[tuple[int, int, Image.Image]]:
    """Left, top and mask of each digit."""
    number = scene.number
    if number is None:
        return []
    typeface, height = random.randrange(TYPEFACES), round(number.height * scale)
    masks = [_digit(typeface, int(digit), height) for digit in number.digits]
    gap = round(random.uniform(0.02, 0.14) * height)
    width = sum(mask.width for mask in masks) + gap * (len(masks) - 1)
    left, top = round(number.x * scale - width / 2), round(number.y * scale - height / 2)
    places = []
    for mask in masks:
        places.append((left, top, mask))
        left += mask.width + gap
    return places


def write_number(picture: Image.Image, scene: Scene, scale: int) -> None:
    """Write a scene's number into a picture of the scene's size times `scale`."""
    random, pen = _number_style(scene), ImageDraw.Draw(picture)
    places = _layout(scene, scale, random)
    left, top, last = places[0][0], places[0][1], places[-1]
    right, bottom = last[0] + last[2].width, top + last[2].height
    mean = picture.crop((left, top, right, bottom)).convert("L").resize((1, 1)).getpixel((0, 0))
    light = isinstance(mean, int) and mean < 128
    if random.random() < 0.55:
        light = random.random() < 0.5
        shade = random.randint(0, 70) if light else random.randint(185, 255)
        margin = random.randint(2, 4) * scale
        plate = left - margin, top - margin, right + margin, bottom + margin
        pen.rectangle(plate, fill=(shade, shade, shade))
    shade = random.randint(215, 255) if light else random.randint(0, 40)
    bold = scale > 1 and random.random() < 0.2
    for x, y, mask in places:
        shape = mask.filter(ImageFilter.MaxFilter(3)) if bold else mask
        picture.paste((shade, shade, shade), (x, y), shape)


@functools.cache
def _sheet() -> Image.Image:
    return Image.open(Path(__file__).with_name("digits.png")).convert("L")


@functools.lru_cache(maxsize=4096)
def _digit(typeface: int, digit: int, height: int) -> Image.Image:
    """A digit's mask, `height` pixels tall and as wide as it needs."""
    width, full = _CELL
    cell = _sheet().crop(
        (digit * width, typeface * full, (digit + 1) * width, (typeface + 1) * full)
    )
    box = cell.getbbox()
    glyph = cell.crop((box[0], 0, box[2], full)) if box else cell
    return glyph.resize(
        (max(2, round(glyph.width * height / full)), height), Image.Resampling.BICUBIC
    )
