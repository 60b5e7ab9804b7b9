"""Heat maps of received attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava_hvp.errors import PictureError
from llava_hvp.show.colours import heat
from llava_hvp.show.frame import Panel, over_pixels
from llava_hvp.show.sheet import FAINT, GAP, Image, below, beside, picture, with_margin, words

SCALES = ("own", "shared")
CELL, LEAST_SIDE = 250, 5  # pixels: about the width of a layer, and of a patch at least
WIDEST = 1900  # pixels of a row of layers
BAR = 14  # pixels, the height of a colour bar
FAINTLY = 3  # of ten parts, the picture below its heat, in grey
MIDDLE = 128
WORDS = (
    "Attention that each patch receives, as a multiple of the even share: dark little, light much"
)


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
    panels : Sequence[Panel]
        with their photo
    received : Mapping[int, Tensor]
        layer -> (tiles, N) float, received attention
    scale : str
        "own" stretches the colours over each layer's values, "shared" over all layers'
    columns : int | None
        cells in a row; 6 by default, fewer for wide pictures
    """
    if scale not in SCALES or not received:
        raise PictureError(f"scale={scale!r}: give one of {', '.join(SCALES)}, and a layer")
    shares = {layer: even_shares(scores) for layer, scores in received.items()}
    everything = torch.stack(list(shares.values()))
    patches = sum(panel.patches.shape[1] for panel in panels)
    side = max(LEAST_SIDE, CELL // patches)
    across = columns or max(1, min(6, WIDEST // (patches * side)))
    cells = [below([_together([_photo(p, side) for p in panels]), words("the picture")], gap=4)]
    for layer, values in shares.items():
        least, most = ends_of(everything if scale == "shared" else values)
        drawn = [picture(heated(values.flatten(), p, least, most, side)) for p in panels]
        parts = [_together(drawn), words(f"layer {layer}")]
        if scale == "own":
            parts.append(bar(least, most, min(parts[0].width, CELL)))
        cells.append(below(parts, gap=4))
    rows = [beside(cells[at : at + across], GAP) for at in range(0, len(cells), across)]
    foot = f"{WORDS}; " + (
        "one scale for all layers." if scale == "shared" else "each layer on a scale of its own."
    )
    parts = [words(title, size=22)] if title else []
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


def heated(values: Tensor, panel: Panel, least: float, most: float, side: int) -> Tensor:
    """(height, width, 3) uint8, values of patches, (tiles * N,), as colours; `side` pixels each.

    Three of ten parts are the panel's photo, in grey.
    """
    smaller = replace(panel, side=side, photo=None)
    colours = heat()[over_pixels(levels(values, least, most), smaller).long()].int()
    grey = _pixels(_photo(panel, side).convert("L").convert("RGB")).int()
    return (((10 - FAINTLY) * colours + FAINTLY * grey + 5) // 10).to(torch.uint8)


def bar(least: float, most: float, width: int) -> Image.Image:
    """A colour bar with its ends in numbers, over the grey that a picture has on average."""
    strip = heat()[torch.linspace(0, 255, width).round().long()].int()
    strip = (((10 - FAINTLY) * strip + FAINTLY * MIDDLE + 5) // 10).to(torch.uint8)
    left, right = words(f"{least:.1f} times", size=13), words(f"{most:.1f} and more", size=13)
    ends = Image.new("RGB", (max(width, left.width + right.width), left.height), (255, 255, 255))
    ends.paste(left, (0, 0))
    ends.paste(right, (ends.width - right.width, 0))
    return below([picture(strip.expand(BAR, -1, -1).contiguous()), ends], gap=2)


def _pixels(drawn: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    return flat.view(drawn.height, drawn.width, 3)


def _photo(panel: Panel, side: int) -> Image.Image:
    rows, columns = panel.patches.shape
    return picture(panel.seen()).resize((columns * side, rows * side), Image.Resampling.BICUBIC)


def _together(drawn: Sequence[Image.Image]) -> Image.Image:
    return beside(drawn, gap=4)
