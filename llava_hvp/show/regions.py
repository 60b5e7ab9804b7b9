"""What each token took in, as regions of one colour over the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_hvp.show.colours import DIMMED, REGIONS, Colour
from llava_hvp.show.frame import Panel, over_pixels
from llava_hvp.show.merging import NOWHERE, Merging
from llava_hvp.show.sheet import PAPER, TEXT, Image, legend

BLACK: Colour = (0, 0, 0)
HOW = (
    "A ringed token holds, besides its own patch, those of its colour. There are seven colours, "
    "which come again apart from each other; a patch in several tokens has that of the nearest."
)


def region_colours(merging: Merging, panels: Sequence[Panel], patches: int) -> dict[int, int]:
    """Token -> number of its colour among REGIONS, other than its neighbours' as far as they go.

    patches : of a tile
    """
    touching: dict[int, set[int]] = {token: set() for token, _ in merging.flows}
    for panel in panels:
        regions = merging.into[panel.patches]
        for one, other in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
            met = torch.stack((one, other), -1)[one != other]
            for a, b in met[(met != NOWHERE).all(-1)].tolist():
                touching[a].add(b)
                touching[b].add(a)
    colours: dict[int, int] = {}
    for token in sorted(touching, key=lambda t: (-len(touching[t]), t)):
        colours[token] = _rarest(touching[token], colours, token // patches, patches)
    return colours


def _rarest(touching: set[int], colours: dict[int, int], tile: int, patches: int) -> int:
    """The colour that the fewest neighbours have; of such, the fewest of the tile, then of all."""
    taken = Counter(colours[token] for token in touching if token in colours)
    of_tile = Counter(colour for token, colour in colours.items() if token // patches == tile)
    used = Counter(colours.values())
    return min(range(len(REGIONS)), key=lambda c: (taken[c], of_tile[c], used[c], c))


def paint_regions(
    base: Tensor, panel: Panel, merging: Merging, colours: dict[int, int], scale: int
) -> Tensor:
    """(height, width, 3) uint8, regions on a panel whose kept patches are photo and others dark.

    A patch that was taken in is two parts of the panel and three parts colour; a token that takes
    in is ringed with its colour between two lines.
    """
    side = panel.side * scale
    table = torch.zeros(len(merging.into), 3, dtype=torch.int32)
    for token, number in colours.items():
        table[merging.into == token] = torch.tensor(REGIONS[number], dtype=torch.int32)
    colour = over_pixels(table, panel, scale)
    taken = over_pixels(merging.merged, panel, scale)[..., None]
    shown = torch.where(taken, (2 * base.to(torch.int32) + 3 * colour + 2) // 5, base)
    rings = torch.zeros(len(merging.into), dtype=torch.bool)
    rings[list(colours)] = True
    ringed = over_pixels(rings, panel, scale)
    down, across = (torch.arange(length) % side for length in base.shape[:2])
    depth = torch.minimum(
        *torch.meshgrid(*(torch.minimum(at, side - 1 - at) for at in (down, across)), indexing="ij")
    )
    line, ring = max(1, side // 28), max(2, side // 6)
    shown = torch.where((ringed & (depth < ring))[..., None], colour, shown)
    edges = (depth < line) | ((depth >= ring - line) & (depth < ring))
    shown = torch.where((ringed & edges)[..., None], torch.zeros_like(shown), shown)
    return torch.where(_borders(merging, panel, side)[..., None], 0, shown).to(torch.uint8)


def _borders(merging: Merging, panel: Panel, side: int) -> Tensor:
    """(height, width) bool, the last line of pixels before another region."""
    regions = merging.into[panel.patches]
    height, width = (length * side for length in regions.shape)
    border = torch.zeros(height, width, dtype=torch.bool)
    below = (regions[1:] != regions[:-1]).repeat_interleave(side, 1)
    right = (regions[:, 1:] != regions[:, :-1]).repeat_interleave(side, 0)
    border[side - 1 : height - 1 : side] = below
    border[:, side - 1 : width - 1 : side] |= right
    return border


def regions_legend(merging: Merging, width: int) -> Image.Image:
    """What the picture of regions shows, with counts."""
    ring, plain = _square(BLACK, REGIONS[1], PAPER), _square(BLACK, PAPER)
    takers, own = len(merging.flows), int(merging.sent.sum())
    held = int(merging.only_held.sum())
    lost = int((~merging.sent & ~merging.merged & ~merging.only_held).sum())
    swatches = {
        "token of several patches": (takers, ring),
        "token of one patch": (own - takers, plain),
        "patch in the token of its colour": (int(merging.merged.sum()), _square(REGIONS[1])),
        "patch in a token at no patch": (held, _square(DIMMED)),
        "dropped": (lost, _square(DIMMED)),
    }
    return legend({f"{name} {n}": square for name, (n, square) in swatches.items() if n}, width)


def _square(*colours: Colour) -> Image.Image:
    """A swatch, of squares within each other."""
    square = Image.new("RGB", (TEXT, TEXT))
    for margin, colour in zip((0, 1, 4), colours, strict=False):
        square.paste(colour, (margin, margin, TEXT - margin, TEXT - margin))
    return square
