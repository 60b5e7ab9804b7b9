"""Putting pictures and words together. PIL is imported by this file and those that draw with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from llava_hvp.errors import PictureError

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise PictureError("drawing needs Pillow: pip install 'llava-hvp[show]'") from error

from torch import Tensor

from llava_hvp.show.colours import Colour

PAPER, INK, FAINT = (255, 255, 255), (25, 25, 30), (120, 120, 128)
GAP = 12  # pixels between things
TEXT = 16  # pixels, the height of text


def picture(pixels: Tensor) -> Image.Image:
    """From (height, width, 3) uint8."""
    return Image.fromarray(pixels.numpy())


def beside(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Left to right, aligned at the top."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures)), PAPER)
    left = 0
    for part in pictures:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


def below(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Top to bottom, aligned at the left."""
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (max(p.width for p in pictures), height), PAPER)
    top = 0
    for part in pictures:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def with_margin(part: Image.Image, margin: int = GAP) -> Image.Image:
    """With paper around it."""
    sheet = Image.new("RGB", (part.width + 2 * margin, part.height + 2 * margin), PAPER)
    sheet.paste(part, (margin, margin))
    return sheet


@functools.cache
def font(size: int) -> Any:
    """PIL's own font; before Pillow 10.1 it has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def words(
    text: str, width: int | None = None, *, size: int = TEXT, ink: Colour = INK
) -> Image.Image:
    """Text as a picture, in lines of at most `width` pixels where it has spaces to break at."""
    text = "".join(c if " " <= c <= "~" else "?" for c in text)  # the font knows ASCII
    lines, face = [""], font(size)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width is None or not lines[-1] or face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(1.3 * size)
    wide = max(1, *(int(face.getlength(line)) + 2 for line in lines))
    sheet = Image.new("RGB", (wide, step * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, fill=ink, font=face)
    return sheet


def legend(swatches: Mapping[str, Image.Image], width: int, *, size: int = TEXT) -> Image.Image:
    """Named swatches in rows of at most `width` pixels."""
    rows: list[list[Image.Image]] = [[]]
    for name, swatch in swatches.items():
        entry = beside([swatch, words(name, size=size)], gap=6)
        taken = sum(part.width + 2 * GAP for part in rows[-1])
        if rows[-1] and taken + entry.width > width:
            rows.append([])
        rows[-1].append(entry)
    return below([beside(row, gap=2 * GAP) for row in rows], gap=4)
