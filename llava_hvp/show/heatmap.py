"""Heat maps of received attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llava_hvp.errors import PictureError
from llava_hvp.show.colours import heat
from llava_hvp.show.frame import Panel, over_pixels, shape_of
from llava_hvp.show.overlay import enlarged
from llava_hvp.show.sheet import FAINT, GAP, Image, below, beside, picture, with_margin, words

SCALES = ("own", "shared")
CELL = 250  # pixels, about the width of a layer
BAR = 14  # pixels, the height of a colour bar


def heat_maps(
    panels: Sequence[Panel],
    received: Mapping[int, Tensor],
    *,
    scale: str = "own",
    title: str = "",
    columns: int | None = None,
) -> Image.Image:
    """The photo, then one cell a layer.

    Parameters
    ----------
    panels : with their photo
    received : layer -> (tiles, N) float, received attention
    scale : "own" stretches the colours over each layer's values, "shared" over all layers'
    columns : cells in a row; 6 for square pictures by default, fewer for wide ones
    """
    if scale not in SCALES or not received:
        raise PictureError(f"scale={scale!r}: give one of {', '.join(SCALES)}, and a layer")
    shares = {layer: even_shares(scores) for layer, scores in received.items()}
    everything = torch.stack(list(shares.values()))
    width, height = shape_of(panels)
    across = columns or max(1, round(6 * min(1.0, 1.2 * height / width)))
    times = max(1, CELL // width)
    cells = [below([_together([enlarged(p, times) for p in panels]), words("the picture")], gap=4)]
    for layer, values in shares.items():
        least, most = ends_of(everything if scale == "shared" else values)
        drawn = [heated(values.flatten(), p, least, most, times) for p in panels]
        parts = [_together(drawn), words(f"layer {layer}")]
        if scale == "own":
            parts.append(bar(least, most, min(parts[0].width, CELL)))
        cells.append(below(parts, gap=4))
    rows = [beside(cells[at : at + across], GAP) for at in range(0, len(cells), across)]
    foot = "received attention, times the even share of 1 / tokens; " + (
        "one scale for all layers" if scale == "shared" else "each layer on a scale of its own"
    )
    parts = [words(title, size=20)] if title else []
    parts += rows
    if scale == "shared":
        parts.append(bar(*ends_of(everything), 2 * CELL))
    parts.append(words(foot, max(row.width for row in rows), ink=FAINT))
    return with_margin(below(parts))


def even_shares(received: Tensor) -> Tensor:
    """Received attention times the number of patches: about 1 where all receive the same."""
    return received.float() * received.shape[-1]


def ends_of(values: Tensor) -> tuple[float, float]:
    """The ends of a colour scale, which are never equal: the least value, and one that 99 % reach
    at most, since a handful of patches receives many times what all others do."""
    least, most = values.min().item(), values.flatten().quantile(0.99).item()
    return least, max(most, least + 1e-6)


def levels(values: Tensor, least: float, most: float) -> Tensor:
    """uint8 of `values`' shape: where they lie between two ends."""
    return ((values - least) / (most - least) * 255).round().clamp(0, 255).to(torch.uint8)


def heated(values: Tensor, panel: Panel, least: float, most: float, scale: int) -> Tensor:
    """(height, width, 3) uint8, a panel with values of patches, (tiles * N,), as colours."""
    return heat()[over_pixels(levels(values, least, most), panel, scale).long()]


def bar(least: float, most: float, width: int) -> Image.Image:
    """A colour bar with its ends in numbers."""
    strip = heat()[torch.linspace(0, 255, width).round().long()]
    left, right = words(f"{least:.2f}", size=12), words(f">= {most:.2f}", size=12)
    ends = Image.new("RGB", (max(width, left.width + right.width), left.height), (255, 255, 255))
    ends.paste(left, (0, 0))
    ends.paste(right, (ends.width - right.width, 0))
    return below([picture(strip.expand(BAR, -1, -1).contiguous()), ends], gap=2)


def _together(drawn: Sequence[Tensor]) -> Image.Image:
    return beside([picture(part) for part in drawn], gap=4)
