"""VisionZip, PruMerge(+), HiRED and FoPru, slowly: one tile at a time, loops and float64.

Written from the papers' rules and not from `llava_hvp`, to be compared with it. Scores are a plain
list with a number a patch; keys and queries are (S, D) arrays whose first row is CLS's. `added` is
patch -> {state: weight}, what the token at the patch holds besides its own state, and `extra` the
weights of the token that stands at no patch; state 0 is CLS, state 1 + patch a patch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from reference import best

Grid = tuple[int, int]
Scores = Sequence[float]


@dataclass
class Merged:
    """What is sent of a tile: roles (patches in the order sent), and what flows into them."""

    roles: dict[str, list[int]]
    added: dict[int, dict[int, float]] = field(default_factory=dict)
    extra: dict[int, float] = field(default_factory=dict)


def cosines(rows: np.ndarray) -> list[list[float]]:
    """Of each row with each."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).tolist()


def visionzip(
    attention: Scores, keys: np.ndarray, heads: int, budget: int, contextual: int | None = None
) -> Merged:
    patches = len(attention)
    if contextual is None:
        contextual = round(5 * budget / 32)
    dominant = best(attention, budget - 1 - contextual)
    likeness = cosines(keys.reshape(1 + patches, heads, -1).mean(1)[1:])
    others = [patch for patch in range(patches) if patch not in dominant]
    targets, members = [], {}
    if contextual:
        step = max(1, len(others) // contextual)
        targets = [others[step * i] for i in range(contextual)]
        members = {target: [] for target in targets}
        for patch in others:
            if patch not in targets:
                most = max(likeness[patch][target] for target in targets)
                nearest = next(t for t in targets if likeness[patch][t] == most)
                members[nearest].append(patch)
    added = {t: {1 + m: 1 / len(ms) for m in ms} for t, ms in members.items() if ms}
    return Merged({"dominant": sorted(dominant), "contextual": targets}, added, {0: 1.0})


def single_softmax(query: np.ndarray, keys: np.ndarray) -> list[float]:
    """Shares of the patches in one softmax over all states and the whole width."""
    logits = np.array([query @ key / np.sqrt(len(query)) for key in keys])
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum())[1:].tolist()


def outliers(scores: Scores) -> list[int]:
    low, high = np.quantile(scores, [0.25, 0.75])
    return [p for p, score in enumerate(scores) if score > high + 1.5 * (high - low)]


def prumerge(
    query: np.ndarray,
    keys: np.ndarray,
    budget: int | None,
    *,
    plus: bool = False,
    neighbours: int = 32,
) -> Merged:
    """`budget` None is the adaptive count."""
    scores = single_softmax(query, keys)
    patches = len(scores)
    if budget is None:
        count = len(outliers(scores))
    else:
        count = round((budget - 1) / 4) if plus else budget - 1
    important = best(scores, count)
    roles = {"important": important}
    if plus:
        roles["sampled"] = sampled(patches, important, budget)
    kept = [patch for role in roles.values() for patch in role]
    added: dict[int, dict[int, float]] = {}
    likeness = cosines(keys[1:])
    for patch in kept:
        others = [other for other in range(patches) if other != patch]
        taken = best(likeness[patch], neighbours, others)
        added[patch] = {1 + other: scores[other] for other in taken}
    extra = {1 + p: scores[p] for p in range(patches) if p not in kept}
    return Merged(roles, added, extra)


def sampled(patches: int, important: list[int], budget: int | None) -> list[int]:
    if budget is None:
        step = max(1, patches // max(len(important), 1) // 3)
        return [p for p in range(0, patches - 1, step) if p not in important]
    left = [patch for patch in range(patches) if patch not in important]
    wanted = budget - 1 - len(important)
    return [left[i * len(left) // wanted] for i in range(wanted)]


def hired(
    shallow: Scores,
    deep: Sequence[Scores],
    grid: Grid,
    budget: int,
    mosaic: Grid | None,
    *,
    alpha: float = 0.5,
    variant: str = "code",
) -> list[set[int]]:
    """Patches of each tile of one image; `shallow` is layer 1's in the first tile."""
    tiles, patches = len(deep), grid[0] * grid[1]
    if tiles == 1:
        return [set(best(deep[0], budget))]
    if mosaic is None:
        return [set(best(tile, max(1, budget // tiles))) for tile in deep]
    first = min(int(budget * alpha), patches)
    left = min(budget - first, (tiles - 1) * patches)
    marked = best(shallow, int(patches * (1 - alpha)))
    kept = [set(best(deep[0], first))]
    for tile in range(tiles - 1):
        own = [p for p in marked if part_of(p, grid, mosaic, tiles - 1, variant) == tile]
        share = np.float32(len(own)) / np.float32(max(len(marked), 1))
        allotted = int(np.floor(share * np.float32(left)))
        kept.append(set(best(deep[1 + tile], min(allotted, patches))))
    return kept


def part_of(patch: int, grid: Grid, mosaic: Grid, others: int, variant: str) -> int:
    if variant == "code":
        return patch * others // (grid[0] * grid[1])
    row, column = divmod(patch, grid[1])
    return row * mosaic[0] // grid[0] * mosaic[1] + column * mosaic[1] // grid[1]


def fopru(score: Scores, grid: Grid, budget: int, strategy: str) -> set[int]:
    if strategy == "rank":
        return set(best(score, budget))
    rows = [sum(score[row * grid[1] : (row + 1) * grid[1]]) for row in range(grid[0])]
    chosen = best(rows, budget // grid[1])
    return {row * grid[1] + column for row in chosen for column in range(grid[1])}


def fopru_softmax(attention: np.ndarray) -> list[float]:
    """The score of a map (heads, S, S)."""
    return attention[:, 1:, 1:].mean((0, 1)).tolist()


def fopru_logits(queries: np.ndarray, keys: np.ndarray, heads: int) -> tuple[list[float], bool]:
    """The score, but for a factor, and whether received and given attention vary as much."""
    split = [x.reshape(len(x), heads, -1).transpose(1, 0, 2)[:, 1:] for x in (queries, keys)]
    logits = split[0] @ split[1].transpose(0, 2, 1)
    received, given = logits.sum((0, 1)), logits.sum((0, 2))
    more = bool(received.var() >= given.var())
    return (received if more else given).tolist(), bool(np.isclose(received.var(), given.var()))
