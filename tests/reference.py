"""The rules of the methods, slowly: loops over the patches of one tile, no tensors.

Written from the papers' rules and not from `llava_hvp`, to be compared with it. A tile is a `grid`
of (rows, columns); scores are a plain list with a number a patch, in raster order. Each rule
returns its roles, role -> set of patch indices, which are disjoint; `kept` is their union.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

Grid = tuple[int, int]
Scores = Sequence[float]
Roles = dict[str, set[int]]

OFFSETS: dict[str, list[Grid]] = {
    "cross": [(-1, 0), (1, 0), (0, -1), (0, 1)],
    "square": [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)],
    "row": [(0, -1), (0, 1)],
    "none": [],
}


def kept(roles: Roles) -> set[int]:
    """The patches of all roles."""
    return set().union(*roles.values())


# What the methods share


def float32(scores: Iterable[float]) -> list[float]:
    """Scores as the methods see them, whatever the tower's dtype."""
    return [float(np.float32(s)) for s in scores]


def best(scores: Scores, count: int, among: Collection[int] | None = None) -> list[int]:
    """The `count` best patches, best first; of equal ones the lower index goes first."""
    candidates = range(len(scores)) if among is None else among
    return sorted(candidates, key=lambda patch: (-scores[patch], patch))[: max(count, 0)]


def mean(layers: Sequence[Scores]) -> list[float]:
    """The mean over layers, added up one by one in float32."""
    total = np.array(layers[0], dtype=np.float32)
    for scores in layers[1:]:
        total = total + np.array(scores, dtype=np.float32)
    return (total / np.float32(len(layers))).tolist()


def p_max(patches: int, *, r_max: float | None = None, share: int | None = None) -> int:
    """Patches that a tile may keep, from `r_max` or from the tile's share of `num_tokens`."""
    if share is not None:
        return min(share, patches)
    assert r_max is not None
    return max(1, round(r_max * patches))


def shares(num_tokens: int, tiles: Sequence[int]) -> list[int]:
    """The share of `num_tokens` that each tile gets; `tiles` is the tiles of each image."""
    return [num_tokens // count for count in tiles for _ in range(count)]


def default_layers(layers: Sequence[int], depth: int, feature_layer: int) -> list[int]:
    """Layers that the papers name for 24, on an encoder of another depth."""
    scaled: list[int] = []
    for layer in layers:
        layer = min(max(1, round(layer * depth / 24)), feature_layer)
        if layer not in scaled:
            scaled.append(layer)
    return scaled


# HIVTP


def blocks(grid: Grid, height: int, width: int) -> list[list[int]]:
    """Patches of each block, from the top left; smaller ones at the right and bottom edge."""
    found = []
    for top in range(0, grid[0], height):
        for left in range(0, grid[1], width):
            block = []
            for row in range(top, min(top + height, grid[0])):
                for column in range(left, min(left + width, grid[1])):
                    block.append(row * grid[1] + column)
            found.append(block)
    return found


def regions_of(grid: Grid, regions: int) -> list[list[int]]:
    return blocks(grid, ceil(grid[0], regions), ceil(grid[1], regions))


def ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


def hivtp_window(grid: Grid, budget: int) -> int:
    """The smallest window that divides the grid and leaves a third of the budget."""
    rows, columns = grid
    for c in range(2, max(grid) + 1):
        divides = rows % c == 0 and columns % c == 0
        if divides and 3 * (budget - (rows // c) * (columns // c)) >= budget:
            return c
    return max(grid)  # the rules name none for a budget of 1: a single window, a single patch


def hivtp_per_region(grid: Grid, budget: int, window: int, regions: int) -> int:
    windows = ceil(grid[0], window) * ceil(grid[1], window)
    assert windows <= budget, "more windows than the budget has patches"
    return (budget - windows) // regions**2


def hivtp(
    layers: Sequence[Scores],
    grid: Grid,
    budget: int,
    regions: int = 2,
    window: int | str = "auto",
) -> Roles:
    """HIVTP with `budget` patches at most; `layers` are the scores of each layer."""
    patches = grid[0] * grid[1]
    if budget >= patches:
        return {"global": set(range(patches)), "local": set()}
    size = hivtp_window(grid, budget) if window == "auto" else int(window)
    return hivtp_stages(layers, grid, hivtp_per_region(grid, budget, size, regions), size, regions)


def hivtp_by_k(
    layers: Sequence[Scores], grid: Grid, k: float, window: int | None, regions: int = 2
) -> Roles:
    """HIVTP by the paper's knobs: `k` percent of a region, and a window or no local stage."""
    whole_region = ceil(grid[0], regions) * ceil(grid[1], regions)
    return hivtp_stages(layers, grid, int(whole_region * k / 100), window, regions)


def hivtp_stages(
    layers: Sequence[Scores], grid: Grid, per_region: int, window: int | None, regions: int
) -> Roles:
    scores = mean(layers)
    global_stage: set[int] = set()
    for region in regions_of(grid, regions):
        global_stage.update(best(scores, per_region, region))
    local_stage: set[int] = set()
    if window is not None:
        for block in blocks(grid, window, window):
            rest = [patch for patch in block if patch not in global_stage]
            local_stage.update(best(scores, 1, rest))
    return {"global": global_stage, "local": local_stage}


# HiPrune


def neighbours_on_grid(patch: int, grid: Grid, buffer: str) -> list[int]:
    """By row and column, none across an edge."""
    row, column = patch // grid[1], patch % grid[1]
    found = []
    for down, right in OFFSETS[buffer]:
        if 0 <= row + down < grid[0] and 0 <= column + right < grid[1]:
            found.append((row + down) * grid[1] + column + right)
    return found


def neighbours_by_flat_index(patch: int, grid: Grid, buffer: str) -> list[int]:
    """As the released code finds them: across rows, and clamped to the first and last patch."""
    last = grid[0] * grid[1] - 1
    return [min(max(patch + down * grid[1] + right, 0), last) for down, right in OFFSETS[buffer]]


def anchors_and_buffers(
    s_object: Scores, grid: Grid, budget: int, alpha: float, buffer: str, variant: str
) -> tuple[list[int], list[int]]:
    """Anchors and buffers, best first; together at most `budget`."""
    find = {"paper": neighbours_on_grid, "code": neighbours_by_flat_index}[variant]
    anchors = best(s_object, round(alpha * budget / 5))
    around: set[int] = set()
    for anchor in anchors:
        around.update(find(anchor, grid, buffer))
    buffers = best(s_object, len(around), around.difference(anchors))
    # The overflow rule: the first of anchors by score, then of buffers by score.
    return anchors[:budget], buffers[: max(budget - len(anchors), 0)]


def fill(roles: Roles, role: str, scores: Scores, up_to: int) -> None:
    """Add a role: the best among the rest, until `up_to` patches are kept."""
    taken = kept(roles)
    rest = [patch for patch in range(len(scores)) if patch not in taken]
    roles[role] = set(best(scores, up_to - len(taken), rest))


def hiprune(
    s_object: Scores,
    s_deep: Scores,
    grid: Grid,
    budget: int,
    alpha: float = 0.1,
    buffer: str = "cross",
    variant: str = "paper",
) -> Roles:
    """HiPrune: exactly `budget` patches."""
    anchors, buffers = anchors_and_buffers(s_object, grid, budget, alpha, buffer, variant)
    roles = {"anchor": set(anchors), "buffer": set(buffers)}
    fill(roles, "register", s_deep, budget)
    return roles


def hiprune_plus(
    s_object: Scores,
    s_deep: Scores,
    relevance: Scores,
    grid: Grid,
    budget: int,
    alpha: float = 0.1,
    beta: float = 0.1,
    buffer: str = "cross",
    variant: str = "paper",
    extra: bool = False,
) -> Roles:
    """HiPrune++: `round(beta * budget)` by relevance, inside the budget or on top (`extra`)."""
    related = round(beta * budget)
    total = budget + related if extra else budget
    anchors, buffers = anchors_and_buffers(s_object, grid, budget, alpha, buffer, variant)
    roles = {"anchor": set(anchors), "buffer": set(buffers)}
    fill(roles, "register", s_deep, total - related)
    fill(roles, "text", relevance, total)
    return roles


# References


def uniform(patches: int, budget: int) -> Roles:
    """Even steps over the raster, from the first patch."""
    return {"uniform": {step * patches // budget for step in range(budget)}}


# (width, height) -> tokens that stock LLaVA-v1.6 sends
STOCK_TOKENS = {
    (640, 480): 2340,
    (480, 640): 2352,
    (640, 427): 2144,
    (336, 336): 1176,
    (800, 400): 1752,
    (1000, 300): 2182,
    (300, 1000): 2232,
    (672, 672): 2928,
}
