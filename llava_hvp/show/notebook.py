"""How reports show themselves in Jupyter: a map of the masks, since they hold no photo."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llava_hvp.errors import PictureError
from llava_hvp.show.colours import DIMMED, Colour, colours_of
from llava_hvp.show.frame import CUT, Report, counts_of, over_pixels, places_of, states_of
from llava_hvp.show.inside import last_of, shown_of
from llava_hvp.show.merging import merging_of

SIDE = 10  # pixels along a patch
LIGHT: Colour = (190, 190, 190)  # of what is kept without a role, and of what unpad cuts off


def png_of(report: Report) -> bytes | None:
    """The map of a report's masks as PNG; None without PIL."""
    try:
        from llava_hvp.show.sheet import below, beside, picture
    except PictureError:
        return None
    sheets = []
    for each in [shown for _, shown in shown_of(report)]:
        table = torch.tensor(list(_table(each)), dtype=torch.uint8)
        numbers = states_of(each).long()
        drawn = [
            picture(over_pixels(table[numbers], replace(panel, side=SIDE)))
            for panel in places_of(each)
        ]
        sheets.append(beside(drawn))
    file = io.BytesIO()
    below(sheets).save(file, "PNG")
    return file.getvalue()


def _table(report: Report) -> Iterator[Colour]:
    """The colour of each state."""
    yield DIMMED
    roles = [colour or LIGHT for colour in colours_of(report.selection.roles).values()]
    yield from roles
    yield from [LIGHT] * (CUT - len(roles))


def html_of(report: Report) -> str:
    """The map with the report's line and its counts."""
    colours = colours_of(last_of(report).selection.roles)
    counts = [
        f'<span style="background:rgb{colours.get(name, DIMMED) or LIGHT};display:inline-block;'
        f'width:.8em;height:.8em"></span> {html.escape(name)} {count}'
        for name, count in counts_of(last_of(report)).items()
    ]
    line = html.escape(repr(report).strip("<>"))
    png = png_of(report)
    data = "" if png is None else base64.b64encode(png).decode()
    image = f'<img alt="{line}" src="data:image/png;base64,{data}">' if data else ""
    merging = merging_of(report)
    merged = "" if merging is None else f"<br>{html.escape(str(merging))}"
    return (
        f"<figure>{image}<figcaption>{line}<br>{' &nbsp; '.join(counts)}{merged}"
        "<br><code>.overlay(image)</code> draws it on the picture</figcaption></figure>"
    )


def html_of_all(reports: Sequence[Report]) -> str:
    """One figure for each image of a call."""
    return "".join(map(html_of, reports)) or "<p>pruned; no image seen yet</p>"
