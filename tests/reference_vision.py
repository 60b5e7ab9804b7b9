"""Rules that choose by cosines, slowly: one set of candidates, one step after the other, float64.

Written from the rules and not from `llava_hvp`, to be compared with it. Every rule returns the
indices in the order of choice, and the `margin`: by how little the closest of its decisions was
taken. Below the rounding of float32 another order is as right.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np

Chosen = tuple[list[int], float]
SPANNED = 1e-5  # who has less of its squared length outside the span of the chosen lies inside


def units(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.maximum(np.sqrt((rows**2).sum(-1, keepdims=True)), 1e-12)


def cosines(rows, others=None) -> np.ndarray:
    return units(rows) @ units(rows if others is None else others).T


def largest(values, among: Collection[int]) -> tuple[int, float]:
    """The first of the largest, and how far the second lies behind (inf where there is none)."""
    ranked = sorted(among, key=lambda i: (-values[i], i))
    gap = values[ranked[0]] - values[ranked[1]] if len(ranked) > 1 else np.inf
    return ranked[0], float(gap)


def cls_best(scores: Sequence[float], count: int) -> list[int]:
    """FasterVLM: the best, best first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def max_min(rows, k: int) -> Chosen:
    """DivPrune: first who has the farthest nearest neighbour, then who is farthest from all."""
    distance = 1 - cosines(rows)
    everyone = range(len(distance))
    # The second smallest distance to all, itself included.
    second = [sorted(distance[i])[1] for i in everyone]
    first, margin = largest(second, everyone)
    order = [first]
    while len(order) < k:
        free = [i for i in everyone if i not in order]
        nearest = {i: min(distance[i][j] for j in order) for i in free}
        index, gap = largest(nearest, free)
        order.append(index)
        margin = min(margin, gap)
    return order, margin


def determinantal(similarity: np.ndarray, quality: Sequence[float], k: int) -> Chosen:
    """Greedy MAP: who makes the determinant of the chosen kernel grow most; the rest by quality."""
    order: list[int] = []
    pivots: list[float] = []
    margin = np.inf
    while len(order) < k:
        free = [i for i in range(len(quality)) if i not in order]
        left = {i: _outside(similarity, i, order) for i in free}
        if any(abs(left[i] - SPANNED) < SPANNED / 2 for i in free):
            margin = 1e-12  # inside or outside: as right
        gains = {i: quality[i] ** 2 * left[i] for i in free if left[i] > SPANNED}
        if not gains:
            if pivots and min(pivots) < 1e-2:
                margin = 1e-12  # rounding has grown past SPANNED: it says who is left outside
            by_quality = sorted(free, key=lambda i: (-quality[i], i))[: k - len(order)]
            return order + by_quality, margin
        index, gap = largest(gains, gains)
        order.append(index)
        pivots.append(left[index])
        margin = min(margin, gap)
    return order, margin


def _outside(similarity: np.ndarray, index: int, chosen: list[int]) -> float:
    """Squared length that the span of the chosen leaves of a unit vector."""
    length = round(similarity[index, index])  # 1 but for rounding, or 0
    if not chosen:
        return length
    inside = similarity[index, chosen]
    independent = similarity[np.ix_(chosen, chosen)]
    return float(length - inside @ np.linalg.solve(independent, inside))


def covering(
    rows, k: int, weight: Sequence[float] | None = None, last: Collection[int] = ()
) -> Chosen:
    """Facility location; `last` are taken when all others are."""
    rows = np.asarray(rows, dtype=np.float64)
    covered = np.zeros(len(rows))
    order: list[int] = []
    margin = np.inf
    while len(order) < k:
        free = [i for i in range(rows.shape[1]) if i not in order]
        free = [i for i in free if i not in last] or free
        gains = {}
        for i in free:
            gain = np.maximum(0, rows[:, i] - covered).sum()
            gains[i] = gain if weight is None else weight[i] * gain
        index, gap = largest(gains, free)
        order.append(index)
        margin = min(margin, gap)
        covered = np.maximum(covered, rows[:, index])
    return order, margin


def vispruner(
    scores: Sequence[float], features, budget: int, ratio: float
) -> tuple[list[int], list[int], float]:
    """VisPruner: what CLS finds important, and what is left when doubles are dropped."""
    important = int(budget * ratio)
    diverse = budget - important
    order = cls_best(scores, len(scores))
    residual = order[important:]
    if diverse == 0:
        return order[:important], [], np.inf
    similarity = cosines(features)
    margin = np.inf
    while len(residual) > diverse:
        even, odd = residual[0::2], residual[1::2]
        drop = min(8, len(residual) - diverse, len(even))
        score = [max(similarity[a, b] for b in odd) for a in even]
        places = sorted(range(len(even)), key=lambda place: (-score[place], place))
        ranked = [score[place] for place in places]
        gaps = [before - after for before, after in itertools.pairwise(ranked)]
        margin = min([margin, *gaps])
        residual = [even[place] for place in places[drop:]] + odd
    return order[:important], residual, margin


def cdpruner(projected, relevance, k: int, negated: bool = True) -> list[Chosen]:
    """CDPruner on the tiles of one image: relevance scaled over all of them, a choice a tile."""
    sign = -1.0 if negated else 1.0
    relevance = [[sign * value for value in tile] for tile in relevance]
    low = min(min(tile) for tile in relevance)
    high = max(max(tile) for tile in relevance)
    found = []
    for tokens, tile in zip(projected, relevance, strict=True):
        if high == low:
            quality = [1.0] * len(tile)
        else:
            quality = [(value - low + 1e-6) / (high - low) for value in tile]
        found.append(determinantal(cosines(tokens), quality, k))
    return found


def scope(scores: Sequence[float], features, k: int, alpha: float = 1.0) -> Chosen:
    """SCOPE: saliency times what a patch covers of the others."""
    return covering(np.maximum(cosines(features), 0), k, [score**alpha for score in scores])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def mmtok(
    words,
    projected,
    features,
    k: int,
    padding: Collection[int] = (),
    alpha: float = 0.5,
    t_text: float = 0.02,
    t_vision: float = 0.2,
) -> Chosen:
    """MMTok: cover the words and the patches."""
    text = softmax(cosines(words, projected) / t_text) / len(words)
    vision = softmax(cosines(features) / t_vision) / len(features)
    return covering(np.concatenate([text, alpha * vision]), k, last=padding)
