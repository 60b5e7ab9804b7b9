"""How reports show themselves in Jupyter: a map of the masks, since they hold no photo."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import replace

import torch

from llava_hvp.errors import PictureError
from llava_hvp.show.colours import DIMMED, colours_of
from llava_hvp.show.frame import Report, counts_of, places_of, states_of
from llava_hvp.show.inside import last_of, shown_of
from llava_hvp.show.merging import merging_of

SIDE = 10  # pixels along a patch
LIGHT = (190, 190, 190)  # in place of the photo


def png_of(report: Report) -> bytes | None:
    """The map of a report's masks as PNG; None without PIL."""
    try:
        from llava_hvp.show.overlay import paint
        from llava_hvp.show.sheet import below, beside, picture
    except PictureError:
        return None
    sheets = []
    for each in [shown for _, shown in shown_of(report)]:
        drawn, colours = [], list(colours_of(each.selection.roles).values())
        for panel in places_of(each):
            rows, columns = panel.patches.shape
            photo = torch.tensor(LIGHT, dtype=torch.uint8).expand(rows * SIDE, columns * SIDE, 3)
            plain = replace(panel, side=SIDE, photo=photo)
            drawn.append(picture(paint(plain, states_of(each), colours, 1)))
        sheets.append(beside(drawn))
    file = io.BytesIO()
    below(sheets).save(file, "PNG")
    return file.getvalue()


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
