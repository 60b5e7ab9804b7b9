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

WIDEST, LARGEST = 1100, 4  # pixels of an overlay, times the size that the model sees
WIDEST_PAIR = 1500  # pixels, where two pictures of one tile stand side by side
NARROWEST = 360  # pixels, so that a legend has room
LEAST = 330  # pixels, the width of one of several pictures of an image
LIGHT, DARK, SQUARE = 250, 222, 7  # the chequers of what unpad cuts off


def overlay(
    report: Report,
    image: Any,
    *,
    scale: int | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    widest: int = WIDEST,
) -> Image.Image:
    """Draw what was kept on the picture; see `ImageReport.overlay`.

    Parameters
    ----------
    title : str
        instead of the method's name
    notes : Sequence[str]
        lines to put below
    widest : int
        pixels, where no scale is given
    """
    panels, shown, merging = frame_of(report, image), shown_of(report), merging_of(report)
    draws_regions = merging is not None and bool(merging.flows)
    is_pair = draws_regions and len(panels) == 1 and not report.stages and widest == WIDEST
    across = 1 if scale else _across(panels, len(shown), widest)
    scale = scale or (
        scale_for((*panels, *panels), WIDEST_PAIR)
        if is_pair
        else scale_for(list(panels) * across, widest)
    )
    colours = list(colours_of(report.selection.roles).values())

    def painted(report: Report) -> Image.Image:
        states = states_of(report)
        colours = list(colours_of(report.selection.roles).values())
        return _row([picture(paint(panel, states, colours, scale)) for panel in panels], panels)

    sheet = painted(report)
    if report.stages:
        sheet = in_rows(
            [below([painted(r), words(caption(n, r))], gap=4) for n, r in shown], across
        )
    if merging is not None and draws_regions:
        regions = region_colours(merging, panels, report.sent.shape[1])
        states, plain = states_of(report), [None] * len(colours)
        drawn = [
            picture(paint_regions(paint(p, states, plain, scale), p, merging, regions, scale))
            for p in panels
        ]
        sheet = (beside if is_pair else below)([sheet, _row(drawn, panels)])
    width = max(sheet.width, NARROWEST)
    said = f"{title or report.method}: {totals(report)}"
    seen = report.view.describe(image.size) if report.view is not None else ""
    lines = [words(note, width - GAP, ink=FAINT) for note in (seen, *notes)]
    texts = [words(said, width - GAP), roles_legend(last_of(report), width - GAP)]
    if merging is not None:
        how = f" {'Right' if is_pair else 'Below'}: {HOW}" if draws_regions else ""
        texts.append(words(f"{merging}.{how}", width - GAP))
        texts += [regions_legend(merging, width - GAP)] if draws_regions else []
    texts += lines
    return below([sheet, with_margin(below(texts, gap=GAP // 2), GAP // 2)], gap=0)


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

    A kept patch is two parts photo and three parts role colour, or the photo where the role has
    none; a pruned one grey and dark, so that no pixel of it has a colour; one that unpad cuts off
    is chequered.
    """
    photo = enlarged(panel, scale).to(torch.int32)
    state = over_pixels(states, panel, scale).long()[..., None]
    table = torch.tensor([(0, 0, 0), *(c or (0, 0, 0) for c in colours)], dtype=torch.int32)
    plain = torch.tensor([False, *(c is None for c in colours)])
    role = state.clamp(max=len(colours))
    tinted = torch.where(plain[role], photo, (2 * photo + 3 * table[role[..., 0]] + 2) // 5)
    grey = (photo * torch.tensor((299, 587, 114), dtype=torch.int32)).sum(-1, keepdim=True)
    dimmed = grey * 35 // 100_000
    shown = torch.where(state == 0, dimmed, tinted)
    return torch.where(state == CUT, chequers(*photo.shape[:2]), shown).to(torch.uint8)


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
            swatches[f"{name} {count}"] = swatch(colours.get(name, DIMMED))
    return legend(swatches, width)


def swatch(colour: Colour | None) -> Image.Image:
    """A square of a legend, empty for no colour."""
    square = Image.new("RGB", (TEXT, TEXT), colour or FAINT)
    if colour is None:
        square.paste(PAPER, (1, 1, TEXT - 1, TEXT - 1))
    return square


def grid(cells: Sequence[Sequence[Image.Image]], title: str = "") -> Image.Image:
    """Overlays in rows, with margins; columns as wide as their widest cell."""
    widths = [max(cell.width for cell in column) for column in zip(*cells, strict=True)]
    rows = []
    for row in cells:
        placed = []
        for cell, width in zip(row, widths, strict=True):
            wide = Image.new("RGB", (width, cell.height), (255, 255, 255))
            wide.paste(cell, (0, 0))
            placed.append(wide)
        rows.append(beside(placed, gap=2 * GAP))
    heading = [words(title, size=TEXT + 4)] if title else []
    return with_margin(below([*heading, *rows], gap=2 * GAP), 2 * GAP)
