"""Which patches stay, drawn on the picture as the model sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_hvp.show.colours import DIMMED, Colour, colours_of
from llava_hvp.show.frame import (
    CUT,
    PRUNED,
    Panel,
    Report,
    counts_of,
    frame_of,
    over_pixels,
    shape_of,
    states_of,
)
from llava_hvp.show.inside import caption, last_of, shown_of, totals
from llava_hvp.show.merging import merging_of
from llava_hvp.show.regions import HOW, paint_regions, region_colours, regions_legend
from llava_hvp.show.sheet import (
    FAINT,
    GAP,
    PAPER,
    TEXT,
    Image,
    below,
    beside,
    legend,
    picture,
    with_margin,
    words,
)

WIDEST, LARGEST = 1560, 4  # pixels of an overlay, times the size that the model sees
NARROWEST = 360  # pixels, so that a legend has room
LEAST = 330  # pixels, the width of one of several pictures of an image
ANSWER = 22  # pixels, the height of an answer's letters
LINE = 14  # an outline is a fourteenth of a patch wide
LIGHT, DARK, SQUARE = 250, 222, 7  # the chequers of what unpad cuts off


def overlay(
    report: Report,
    image: Any,
    *,
    scale: int | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    answers: tuple[str, str] | None = None,
    original: bool = True,
    widest: int = WIDEST,
) -> Image.Image:
    """Draw what was kept beside the picture; see `ImageReport.overlay`.

    Parameters
    ----------
    title : str
        instead of the method's name
    notes : Sequence[str]
        lines to put below
    answers : tuple[str, str] | None
        what was answered unpruned and pruned, to put below the two
    original : bool
        whether the unpruned picture stands at the left
    widest : int
        pixels, where no scale is given
    """
    panels, shown, merging = frame_of(report, image), shown_of(report), merging_of(report)
    draws_regions = merging is not None and bool(merging.flows)
    is_row = len(panels) == 1 and not report.stages
    beside_it = [panels[0]] * original
    across = 1 if scale else _across((*beside_it, *panels), len(shown), widest)
    drawn_twice = draws_regions and is_row and original
    scale = scale or scale_for(
        [*beside_it, *list(panels) * across, *panels[: int(drawn_twice)]], widest
    )

    def painted(report: Report) -> Image.Image:
        states = states_of(report)
        colours = list(colours_of(report.selection.roles).values())
        return _row([picture(paint(panel, states, colours, scale)) for panel in panels], panels)

    sheet = painted(report)
    if report.stages:
        sheet = in_rows(
            [below([painted(r), words(caption(n, r))], gap=4) for n, r in shown], across
        )
    said = f"{title or report.method}: {totals(report)}"
    sheets = [captioned(sheet, said, answers and answers[1], least=NARROWEST)]
    if merging is not None and draws_regions:
        regions = region_colours(merging, panels, report.sent.shape[1])
        states, plain = states_of(report), [None] * len(report.selection.roles)
        drawn = [
            picture(paint_regions(paint(p, states, plain, scale), p, merging, regions, scale))
            for p in panels
        ]
        sheets.append(captioned(_row(drawn, panels), "what each token took in"))
    whole = (beside if is_row else below)(sheets)
    if original:
        unpruned = f"{'unpruned' if answers else 'the picture'}: {report.stock_tokens} tokens"
        whole = beside(
            [captioned(original_of(image, panels, scale), unpruned, answers and answers[0]), whole]
        )
    width = max(whole.width, NARROWEST) - GAP
    seen = report.view.describe(image.size) if report.view is not None and original else ""
    texts = [roles_legend(last_of(report), width)]
    if merging is not None:
        texts.append(words(f"{merging}.{f' {HOW}' if draws_regions else ''}", width))
        texts += [regions_legend(merging, width)] if draws_regions else []
    texts += [words(note, width, ink=FAINT) for note in (seen, *notes) if note]
    return below([whole, *texts], gap=GAP // 2)


def original_of(image: Any, panels: Sequence[Panel], scale: int) -> Image.Image:
    """The picture unpruned: a single tile as the model sees it, else in its own proportions."""
    if len(panels) == 1:
        return picture(enlarged(panels[0], scale))
    height = panels[0].patches.shape[0] * panels[0].side * scale
    width = max(1, min(2 * height, round(image.width * height / image.height)))
    height = max(1, round(image.height * width / image.width))
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def captioned(
    drawn: Image.Image, said: str, answer: str | None = None, *, least: int = 0
) -> Image.Image:
    """A picture with its line below, and an answer in larger letters."""
    width = max(drawn.width, least)
    lines = [words(said, width)]
    if answer is not None:
        lines.append(words(f"answer: {answer or '(none)'}", width, size=ANSWER))
    return below([drawn, *lines], gap=GAP // 2)


def _row(drawn: Sequence[Image.Image], panels: Sequence[Panel]) -> Image.Image:
    """Panels side by side, with their names where there are several."""
    if len(panels) == 1:
        return drawn[0]
    named = zip(drawn, panels, strict=True)
    return beside([below([d, words(p.name, ink=FAINT)], gap=4) for d, p in named])


def _across(panels: Sequence[Panel], count: int, widest: int) -> int:
    """How many of the pictures of an image stand side by side, each large enough to be read."""
    width, _ = shape_of(panels)
    wide = width * math.ceil(LEAST / width)
    return max(1, min(count, (widest - GAP) // (wide + GAP)))


def in_rows(pictures: Sequence[Image.Image], across: int) -> Image.Image:
    """So many pictures side by side, row below row."""
    starts = range(0, len(pictures), across)
    return below([beside(pictures[start : start + across]) for start in starts])


def scale_for(panels: Sequence[Panel], widest: int = WIDEST) -> int:
    """Times the size that the model sees, so that the panels are at most `widest` pixels wide."""
    width, _ = shape_of(panels)
    return min(LARGEST, max(1, (widest - GAP) // width))


def enlarged(panel: Panel, scale: int) -> Tensor:
    """(height, width, 3) uint8, a panel's photo at a whole multiple of its size."""
    if scale == 1:
        return panel.seen()
    photo = picture(panel.seen())
    larger = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(larger.tobytes()), dtype=torch.uint8).view(
        larger.height, larger.width, 3
    )


def paint(panel: Panel, states: Tensor, colours: Sequence[Colour | None], scale: int) -> Tensor:
    """(height, width, 3) uint8, a panel with its patches in the colours of their states.

    A kept patch is the photo, outlined in its role's colour where the role has one and another
    state begins; a pruned one grey and dark, so that no pixel of it has a colour; one that unpad
    cuts off is chequered.
    """
    photo = enlarged(panel, scale).to(torch.int32)
    state = over_pixels(states, panel, scale).long()[..., None]
    grey = (photo * torch.tensor((299, 587, 114), dtype=torch.int32)).sum(-1, keepdim=True)
    shown = torch.where(state == PRUNED, grey * 35 // 100_000, photo)
    table = torch.tensor([(0, 0, 0), *(c or (0, 0, 0) for c in colours)], dtype=torch.int32)
    outlined = torch.tensor([False, *(c is not None for c in colours)])
    role = state[..., 0].clamp(max=len(colours))
    edge = _edges(states[panel.patches], panel.side * scale) & outlined[role]
    shown = torch.where(edge[..., None], table[role], shown)
    return torch.where(state == CUT, chequers(*photo.shape[:2]), shown).to(torch.uint8)


def _edges(states: Tensor, side: int) -> Tensor:
    """(rows * side, columns * side) bool, lines within patches where another state begins."""
    rows, columns = states.shape
    line = max(1, side // LINE)
    edge = torch.zeros(rows, side, columns, side, dtype=torch.bool)
    edge[:, :line] |= _begins(states)[:, None, :, None]
    edge[:, -line:] |= _begins(states.flip(0)).flip(0)[:, None, :, None]
    edge[..., :line] |= _begins(states.T).T[:, None, :, None]
    edge[..., -line:] |= _begins(states.flip(1).T).T.flip(1)[:, None, :, None]
    return edge.view(rows * side, columns * side)


def _begins(states: Tensor) -> Tensor:
    """Bool of the same shape, where a row has another state than the one before it."""
    first = torch.ones_like(states[:1], dtype=torch.bool)
    return torch.cat((first, states[1:] != states[:-1]))


def chequers(height: int, width: int) -> Tensor:
    """(height, width, 1) int32, the pattern of what is not there."""
    down, right = (torch.arange(length) // SQUARE for length in (height, width))
    return torch.where((down[:, None] + right) % 2 == 0, LIGHT, DARK)[..., None].to(torch.int32)


def roles_legend(report: Report, width: int) -> Image.Image:
    """Roles with their counts, and what pruned and cut patches look like."""
    colours = colours_of(report.selection.roles)
    swatches = {}
    for name, count in counts_of(report).items():
        if name == "cut":
            pixels = chequers(TEXT, TEXT).expand(-1, -1, 3).to(torch.uint8).contiguous()
            swatches[f"cut off by unpad {count}"] = picture(pixels)
        else:
            square = Image.new("RGB", (TEXT, TEXT), DIMMED)
            swatches[f"{name} {count}"] = swatch(colours[name]) if name in colours else square
    return legend(swatches, width)


def swatch(colour: Colour | None) -> Image.Image:
    """A square of a legend: outlined as kept patches are, faintly for those without a colour."""
    square = Image.new("RGB", (TEXT, TEXT), colour or FAINT)
    line = 1 if colour is None else TEXT // 4
    square.paste(PAPER, (line, line, TEXT - line, TEXT - line))
    return square


def grid(
    cells: Sequence[Sequence[Image.Image]], original: Image.Image, title: str = ""
) -> Image.Image:
    """Overlays in rows right of the unpruned picture; columns as wide as their widest cell."""
    widths = [max(cell.width for cell in column) for column in zip(*cells, strict=True)]
    rows = []
    for row in cells:
        placed = []
        for cell, width in zip(row, widths, strict=True):
            wide = Image.new("RGB", (width, cell.height), (255, 255, 255))
            wide.paste(cell, (0, 0))
            placed.append(wide)
        rows.append(beside(placed, gap=2 * GAP))
    sheet = beside([original, below(rows, gap=2 * GAP)], gap=2 * GAP)
    return titled(sheet, title)


def titled(sheet: Image.Image, title: str) -> Image.Image:
    """A sheet with its title above it, and margins."""
    heading = [words(title, sheet.width, size=ANSWER)] if title else []
    return with_margin(below([*heading, sheet], gap=GAP), 2 * GAP)
