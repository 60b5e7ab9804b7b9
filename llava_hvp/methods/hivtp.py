"""HIVTP: regional top-k, then the best of every window, by middle-layer attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.errors import OptionError, shown
from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import checked_layers, integer, number, scaled_layers
from llava_hvp.methods.masks import Grid, top_k_per_block
from llava_hvp.methods.worth import LayerSet, Values, WorthTrying


@dataclass(frozen=True, kw_only=True)
class HIVTP(VisionMethod):
    """HIVTP (arXiv 2509.23663, Section 4).

    The score is the mean received attention of `layers`. The global stage keeps the best patches
    of each of `regions` x `regions` blocks, the local stage the best remaining patch of each
    `window` x `window` window; both sizes follow from the budget, or are given by `k` and `window`.

    Parameters
    ----------
    layers : tuple[int, ...] | None
        layers of the score, numbered from 1; 7 to 10 of 24 by default (Section 5.1). The released
        code averages three: `layers=(7, 8, 9)`.
    regions : int
        blocks along each side (paper: r); 1 switches the region division off
    window : int | str | None
        patches along a window's side (paper: c); None with `k` switches the local stage off
    k : float | None
        percent of each region that the global stage keeps, instead of `r_max`
    """

    name: ClassVar[str] = "hivtp"
    summary: ClassVar[str] = "regional top-k and the best of every window, by layers 7-10"
    roles: ClassVar[tuple[str, ...]] = ("global", "local")
    worth_trying: ClassVar[WorthTrying] = {
        "layers": LayerSet(),
        "regions": Values((1, 2, 3, 4)),
        "window": Values(("auto", 2, 3, 4, 6)),
    }

    layers: tuple[int, ...] | None = None
    regions: int = 2
    window: int | str | None = "auto"
    k: float | None = None

    def __post_init__(self) -> None:
        if self.k is not None:
            number(self, "k", above=0, most=100)
            if self.r_max is not None or self.num_tokens is not None:
                raise OptionError(f"hivtp: k={self.k!r} excludes r_max and num_tokens: give one")
            if self.window == "auto":
                raise OptionError(f"hivtp: k={self.k!r} needs window: an integer, or None for none")
        elif self.window is None:
            raise OptionError(
                "hivtp: window=None (no local stage) goes with k, as k=50, window=None"
            )
        super().__post_init__()
        integer(self, "regions", least=1)
        if self.window not in ("auto", None):
            integer(self, "window", least=1)
        if self.layers is not None:
            layers = self.layers
            valid = isinstance(layers, (tuple, list)) and all(type(x) is int for x in layers)
            if not valid or not layers:
                raise OptionError(f"hivtp: layers={shown(layers)}: give a tuple of layer numbers")
            object.__setattr__(self, "layers", tuple(dict.fromkeys(layers)))

    def _has_budget(self) -> bool:
        return self.k is not None or super()._has_budget()

    def _has_plain_budget(self) -> bool:
        return self.k is None

    def _layers(self, depth: int | None, feature_layer: int | None) -> tuple[int, ...]:
        if self.layers is None:
            return scaled_layers((7, 8, 9, 10), depth, feature_layer)
        return checked_layers(self.layers, depth, feature_layer, "hivtp: layers")

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(received_attention=self._layers(depth, feature_layer))

    def check(self, grid: Grid) -> None:
        if self.num_tokens is None:
            self.sizes(grid, self.budget(grid[0] * grid[1]))

    def sizes(self, grid: Grid, budget: int) -> tuple[int, int | None]:
        """(`per_region`, `window`) for a budget of p_max patches on a grid.

        The window is the smallest that divides the grid and leaves the global stage a third of
        the budget; all in integers, since floating point loses a token at r_max = 0.25.
        """
        if self.k is not None:
            block = math.prod(_block(grid, self.regions))
            return int(block * self.k / 100), None if self.window is None else int(self.window)
        window = self._fitting(grid, budget) if self.window == "auto" else int(self.window or 0)
        windows = math.prod(-(-side // window) for side in grid)
        if windows > budget:
            raise OptionError(
                f"hivtp: window={window} cuts {grid[0]} x {grid[1]} patches into {windows} "
                f"windows, but the budget is {budget} patches: give a larger window or r_max"
            )
        return (budget - windows) // self.regions**2, window

    @staticmethod
    def _fitting(grid: Grid, budget: int) -> int:
        for window in range(2, min(grid) + 1):
            if grid[0] % window == 0 and grid[1] % window == 0:
                windows = grid[0] // window * (grid[1] // window)
                if 3 * (budget - windows) >= budget:
                    return window
        return max(grid)  # a budget too small for any: the whole grid is one window

    def choose(self, context: VisionContext, budget: int) -> Selection:
        layers = self._layers(context.depth, context.feature_layer)
        score = torch.stack([context.score("received_attention", layer) for layer in layers]).mean(
            0
        )
        per_region, window = self.sizes(context.grid, budget)
        regional = top_k_per_block(
            score, context.grid, _block(context.grid, self.regions), per_region
        )
        local = torch.zeros_like(regional)
        if window is not None:
            local = top_k_per_block(score, context.grid, (window, window), 1, among=~regional)
        return Selection.from_roles({"global": regional, "local": local})


def _block(grid: Grid, regions: int) -> Grid:
    return -(-grid[0] // regions), -(-grid[1] // regions)
