"""The frame of every picture here: what the model sees of a photo, and where each patch lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llava_hvp.errors import OptionError, PictureError
from llava_hvp.methods.base import Selection
from llava_hvp.methods.masks import Grid

# States of a patch besides its role, which is 1, 2, … in the order of the selection's roles.
PRUNED, CUT = 0, 255


@dataclass(frozen=True)
class Panel:
    """One rectangle of patches: a single tile, the base tile, or the mosaic of AnyRes.

    Parameters
    ----------
    name : str
        what to write above it, "" for a single tile
    patches : Tensor
        (rows, columns) int64, for each place the patch shown there, `tile * N + patch` counted over
        the image's own tiles
    side : int
        pixels along a patch
    photo : Tensor | None
        (rows * side, columns * side, 3) uint8, the picture as the model sees it; None where only
        the places are known
    """

    name: str
    patches: Tensor
    side: int
    photo: Tensor | None = None

    def seen(self) -> Tensor:
        """The photo; raises PictureError where only the places are known."""
        if self.photo is None:
            raise PictureError("these panels have no photo: take them from a view's frame(image)")
        return self.photo

    def with_photo(self, shown: Tensor) -> Panel:
        """The panel with what `photo_of` gives laid where its patches lie."""
        chosen = shown.flatten(0, 2)[self.patches]  # rows, columns, side, side, 3
        photo = chosen.transpose(1, 2).flatten(0, 1).flatten(1, 2).contiguous()
        return dataclasses.replace(self, photo=photo)


def photo_of(pixels: Tensor, mean: Sequence[float], std: Sequence[float], side: int) -> Tensor:
    """(tiles, rows, columns, side, side, 3) uint8 patches of normalised pixels.

    Parameters
    ----------
    pixels : Tensor
        (tiles, 3, H, W), normalised by mean and std
    side : int
        pixels along a patch; those past the last whole patch are in none, and a tower does not see
        them
    """
    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
    photo = ((pixels.float() * stds + means) * 255).round().clamp(0, 255).to(torch.uint8)
    return photo.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)


class View(Protocol):
    """How a model sees pictures; each host has its own."""

    def panels(self, tiles: int, size: tuple[int, int] | None) -> tuple[Panel, ...]:
        """Where the patches of an image of `tiles` tiles lie."""

    def frame(self, image: Any) -> tuple[Panel, ...]:
        """Where the patches of a PIL image lie, with its photo."""

    def describe(self, size: tuple[int, int]) -> str:
        """What becomes of a picture of (width, height), in a line."""

    def pixels(self, image: Any) -> Tensor:
        """(tiles, 3, H, W) of a PIL image; raises PictureError where it cannot be processed."""


class Report(Protocol):
    """What pruning did to an image, as far as pictures show it: an `ImageReport` of the core."""

    @property
    def method(self) -> str: ...
    @property
    def tiles(self) -> int: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def selection(self) -> Selection: ...
    @property
    def sent(self) -> Tensor: ...
    @property
    def stock(self) -> Tensor | None: ...
    @property
    def view(self) -> View | None: ...
    @property
    def stock_tokens(self) -> int: ...
    @property
    def kept_tokens(self) -> int: ...
    @property
    def kept_patches(self) -> int: ...
    @property
    def kept_of_stock(self) -> float: ...
    @property
    def kept_of_patches(self) -> float: ...
    @property
    def average_tokens(self) -> float: ...
    @property
    def layer_tokens(self) -> tuple[int, ...]: ...
    @property
    def stage_layers(self) -> tuple[int, ...]: ...
    @property
    def stages(self) -> tuple[Tensor, ...]: ...


def frame_of(report: Report, image: Any) -> tuple[Panel, ...]:
    """The panels of the picture that a report is of.

    Raises PictureError for a picture of another size, and for a report that does not know how the
    model sees pictures.
    """
    if report.view is None:
        raise PictureError(
            "this report does not know how the model sees pictures: take one from pruned.last"
        )
    if report.size is not None and tuple(image.size) != report.size:
        raise PictureError(
            f"a picture of {image.size[0]} x {image.size[1]} pixels, but the report is of one of "
            f"{report.size[0]} x {report.size[1]}: give the picture that the model was given"
        )
    panels = report.view.frame(image)
    patches = report.tiles * report.grid[0] * report.grid[1]
    if sum(panel.patches.numel() for panel in panels) != patches:
        raise PictureError(
            f"the model sees this picture in other tiles than the report's {report.tiles}: give "
            "the picture that the model was given"
        )
    return panels


def places_of(report: Report) -> tuple[Panel, ...]:
    """The panels of a report without any photo; without a view, its tiles side by side."""
    if report.view is not None:
        return report.view.panels(report.tiles, report.size)
    rows, columns = report.grid
    index = torch.arange(report.tiles * rows * columns).view(report.tiles, rows, columns)
    return (Panel("", index.transpose(0, 1).reshape(rows, -1), 1),)


def states_of(report: Report) -> Tensor:
    """(tiles * N,) uint8: PRUNED, the number of the role it is kept for, or CUT by unpad.

    Raises OptionError for a selection of more roles than a byte holds.
    """
    roles = report.selection.roles
    if len(roles) >= CUT:
        raise OptionError(f"{report.method} has {len(roles)} roles: {CUT - 1} can be told apart")
    states = torch.zeros(report.sent.numel(), dtype=torch.uint8)
    for number, mask in enumerate(roles.values(), 1):
        states[(mask & report.sent).flatten()] = number
    if report.stock is not None:
        # What unpad cuts off; tokens that follow their tile are sent from there too.
        states[~(report.stock | report.sent).flatten()] = CUT
    return states


def counts_of(report: Report) -> dict[str, int]:
    """Patches by role, then `pruned`, and `cut` where unpad removed any; all of them together."""
    states = states_of(report)
    numbers = {role: n for n, role in enumerate(report.selection.roles, 1)}
    numbers |= {"pruned": PRUNED} | ({"cut": CUT} if bool((states == CUT).any()) else {})
    return {name: int((states == number).sum()) for name, number in numbers.items()}


def over_pixels(values: Tensor, panel: Panel, scale: int = 1) -> Tensor:
    """Values of patches, (tiles * N, …), spread over a panel's pixels: (height, width, …)."""
    spread = values[panel.patches]
    for axis in (0, 1):
        spread = spread.repeat_interleave(panel.side * scale, axis)
    return spread


def shape_of(panels: Sequence[Panel]) -> tuple[int, int]:
    """(width, height) in pixels of panels side by side, gaps left out."""
    width = sum(p.patches.shape[1] * p.side for p in panels)
    return width, max(p.patches.shape[0] * p.side for p in panels)
