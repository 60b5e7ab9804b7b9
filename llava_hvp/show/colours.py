"""Colours: one for each role, and a scale for heat that is even to the eye."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Colour = tuple[int, int, int]

# The one role of a picture that is not pruned; its patches have no outline.
UNPRUNED = "unpruned"
# From M. Okabe and K. Ito's palette, which colour-blind readers tell apart; roles of one method
# differ in lightness too.
ROLES: Mapping[str, Colour | None] = {
    UNPRUNED: None,
    "global": (86, 180, 233),
    "local": (230, 159, 0),
    "anchor": (240, 228, 66),
    "buffer": (213, 94, 0),
    "register": (0, 158, 115),
    "text": (86, 180, 233),
}
# Methods without roles of their own have one role, named after them.
NEUTRAL: Colour = (230, 159, 0)
# In legends, of what is pruned: grey and dark in the picture.
DIMMED: Colour = (60, 60, 60)
# For the roles of methods that we have not met.
OTHERS: tuple[Colour, ...] = (NEUTRAL, (86, 180, 233), (204, 121, 167), (0, 158, 115))
# Of what a token took in.
REGIONS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)

# Of heat, from least to most: dark violet to pale yellow.
LIGHTNESS, HUE, MOST_CHROMA = (0.20, 0.96), (300.0, 100.0), 0.13


def colours_of(roles: Iterable[str]) -> dict[str, Colour | None]:
    """A colour for each role, no two alike as long as there are colours; None for no outline."""
    roles = list(roles)
    strangers = [role for role in roles if role not in ROLES]
    taken = [ROLES[role] for role in roles if role in ROLES]
    free = [colour for colour in OTHERS if colour not in taken]
    others = {role: free[number % len(free)] for number, role in enumerate(strangers)}
    return {role: others[role] if role in others else ROLES[role] for role in roles}


@functools.cache
def heat() -> Tensor:
    """(256, 3) uint8, from least to most.

    Lightness rises in even steps of OKLab (B. Ottosson, 2020), which is about even to the eye,
    while the hue turns from violet over green to yellow; each colour is as strong as
    sRGB allows, up to a bound that keeps the turn smooth.
    """
    steps = [i / 255 for i in range(256)]
    colours = [_strongest(_between(LIGHTNESS, x), _between(HUE, x)) for x in steps]
    return torch.tensor(colours, dtype=torch.uint8)


def _between(ends: tuple[float, float], x: float) -> float:
    return ends[0] + x * (ends[1] - ends[0])


def _strongest(lightness: float, hue: float) -> list[int]:
    """The colour of most chroma that sRGB has at a lightness and hue (degrees)."""
    least, most = 0.0, MOST_CHROMA
    for _ in range(20):
        chroma = (least + most) / 2
        inside = all(0 <= x <= 1 for x in _linear(lightness, chroma, hue))
        least, most = (chroma, most) if inside else (least, chroma)
    return [round(255 * _encoded(x)) for x in _linear(lightness, least, hue)]


def _linear(lightness: float, chroma: float, hue: float) -> list[float]:
    """Linear sRGB of an OKLab colour; outside [0, 1] where sRGB does not have it."""
    a, b = (chroma * f(math.radians(hue)) for f in (math.cos, math.sin))
    cones = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    rows = (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
    return [sum(x * y for x, y in zip(row, cones, strict=True)) for row in rows]


def _encoded(x: float) -> float:
    x = min(1.0, max(0.0, x))
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055
