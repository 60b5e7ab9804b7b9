"""The greedy choices take what slow loops in float64 take, all sets of candidates at once."""

import numpy as np
import pytest
import reference_vision as slow
import torch

from llava_hvp.methods import greedy
from llava_hvp.methods.masks import first_best

ROUNDING = 1e-5  # decisions closer than this may fall either way in float32


def rows_of(seed, kind, sets, candidates, dim):
    """(sets, candidates, dim) float32: apart from each other, in clusters, or with exact doubles.

    `exact` are plus or minus basis vectors, and zeros: their cosines are -1, 0 and 1, in any
    precision, and full of ties.
    """
    g = np.random.default_rng(seed)
    apart = g.standard_normal((sets, candidates, dim)).astype(np.float32)
    label = g.integers(0, max(1, candidates // 3), (sets, candidates))
    if kind == "apart":
        return torch.from_numpy(apart)
    if kind == "clusters":
        centers = g.standard_normal((sets, candidates, dim)).astype(np.float32)
        near = centers[np.arange(sets)[:, None], label]
        return torch.from_numpy(near + np.float32(0.1) * apart)
    sign = g.integers(-1, 2, (sets, candidates, 1)).astype(np.float32)
    return torch.from_numpy(sign * np.eye(dim, dtype=np.float32)[label % dim])


def weights_of(seed, kind, sets, candidates):
    g = np.random.default_rng([seed, 1])
    if kind == "exact":
        return torch.from_numpy(g.integers(0, 3, (sets, candidates)).astype(np.float32) / 4)
    return torch.from_numpy(g.random((sets, candidates), dtype=np.float32))


KINDS = ["apart", "clusters", "exact"]
each_kind = pytest.mark.parametrize("kind", KINDS)
CASES = 250  # a kind and a rule, two sets each


class Tally:
    """Compares orders, and counts those that rounding leaves open.

    A margin of 0 leaves nothing open: two that are nearest to each other tie in any precision, and
    the lower index goes first.
    """

    def __init__(self):
        self.compared, self.open = 0, 0

    def compare(self, found, expected, kind, case):
        order, margin = expected
        assert len(set(found)) == len(found) == len(order), case
        if kind != "exact" and 0 < margin < ROUNDING:
            self.open += 1
            return
        self.compared += 1
        assert found == order, case

    def assert_most_compared(self):
        assert self.compared > 2 * self.open


def sizes(seed):
    g = np.random.default_rng([seed, 2])
    candidates = int(g.integers(2, 25))
    return candidates, int(g.integers(2, 20)), int(g.integers(1, candidates + 1))


@each_kind
def test_max_min_chooses_as_the_slow_rule(kind):
    tally = Tally()
    for seed in range(CASES):
        candidates, dim, k = sizes(seed)
        rows = rows_of(seed, kind, 2, candidates, dim)
        order = greedy.farthest_first(greedy.cosines(rows), k)
        for found, each in zip(order.tolist(), rows.numpy(), strict=True):
            tally.compare(found, slow.max_min(each, k), kind, seed)
    tally.assert_most_compared()


@each_kind
def test_the_determinantal_choice_is_that_of_the_slow_rule(kind):
    tally, filled = Tally(), 0
    for seed in range(CASES):
        candidates, dim, k = sizes(seed)
        rows = rows_of(seed, kind, 2, candidates, dim)
        quality = weights_of(seed, kind, 2, candidates)
        order = greedy.determinantal(greedy.cosines(rows), quality, k)
        each = zip(order.tolist(), rows.numpy(), quality.tolist(), strict=True)
        for found, one, q in each:
            tally.compare(found, slow.determinantal(slow.cosines(one), q, k), kind, seed)
            filled += k > np.linalg.matrix_rank(one)
    tally.assert_most_compared()
    assert filled > CASES / 10  # more were asked for than are independent


def rows_to_cover(seed, kind, sets, candidates, dim):
    """Cosines with others than the candidates: among themselves, two near ones gain the same."""
    candidate = rows_of(seed, kind, sets, candidates, dim)
    other = rows_of(seed + CASES, kind, sets, dim, dim)
    return greedy.unit(other) @ greedy.unit(candidate).transpose(-1, -2)


@each_kind
def test_covering_chooses_as_the_slow_rule(kind):
    tally = Tally()
    for seed in range(CASES):
        candidates, dim, k = sizes(seed)
        rows = rows_to_cover(seed, kind, 2, candidates, dim)
        weight = weights_of(seed, kind, 2, candidates) if seed % 2 else None
        last = weights_of(seed + CASES, "exact", 2, candidates) > 0.3 if seed % 3 else None
        order = greedy.covering(rows, k, weight, last)
        for i, found in enumerate(order.tolist()):
            expected = slow.covering(
                rows[i].numpy(),
                k,
                None if weight is None else weight[i].tolist(),
                () if last is None else last[i].nonzero().flatten().tolist(),
            )
            tally.compare(found, expected, kind, seed)
    tally.assert_most_compared()


def orders(rows, weight, k):
    """The choices of every rule."""
    similarity = greedy.cosines(rows)
    yield greedy.farthest_first(similarity, k)
    yield greedy.determinantal(similarity, weight, k)
    yield greedy.covering(similarity, k, weight)
    # Not symmetric, as in MMTok; else two near ones gain the same, and rounding decides.
    yield greedy.covering((5 * similarity).softmax(-1), k, None, weight > 0.5)


@each_kind
def test_several_sets_choose_as_each_alone(kind):
    for seed in range(40):
        candidates, dim, k = sizes(seed)
        rows = rows_of(seed, kind, 5, candidates, dim)
        weight = weights_of(seed, kind, 5, candidates)
        together = list(orders(rows, weight, k))
        for i in range(5):
            alone = orders(rows[i : i + 1], weight[i : i + 1], k)
            for one, all_ in zip(alone, together, strict=True):
                assert torch.equal(one[0], all_[i]), (seed, i)


@each_kind
def test_all_candidates_can_be_chosen_each_once(kind):
    for candidates in (1, 2, 49, 144, 256):
        rows = rows_of(candidates, kind, 2, candidates, 6)
        weight = weights_of(candidates, kind, 2, candidates)
        for order in orders(rows, weight, candidates):
            assert order.sort(-1).values.tolist() == [list(range(candidates))] * 2


def test_rows_without_a_direction_are_chosen_without_nan():
    rows = torch.zeros(2, 9, 4)
    for order in orders(rows, torch.zeros(2, 9), 9):
        assert order.tolist() == [list(range(9))] * 2


def test_more_than_are_independent_are_filled_up_by_quality():
    # Two directions only; 0 and 3 span them, then quality decides.
    rows = torch.eye(2)[[0, 0, 1, 1, 0]][None]
    quality = torch.tensor([[0.9, 0.5, 0.1, 0.8, 0.6]])
    assert greedy.determinantal(greedy.cosines(rows), quality, 5).tolist() == [[0, 3, 4, 1, 2]]


def test_a_double_of_high_quality_waits_for_what_is_new_however_poor():
    rows = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    rows[0, 1] = 3 * rows[0, 0]
    quality = torch.tensor([[1.0, 1.0, 1e-6]])
    assert greedy.determinantal(greedy.cosines(rows), quality, 2).tolist() == [[0, 2]]


def test_the_best_is_the_first_of_equals_also_where_all_are_minus_infinity():
    scores = torch.tensor([[1.0, 3, 3, 2], [-torch.inf] * 4, [0, 0, 0, 0.5]])
    assert first_best(scores).tolist() == [1, 0, 3]


def test_the_best_of_nan_is_a_candidate():
    assert first_best(torch.full((1, 5), torch.nan)).tolist() == [4]


def test_cosines_of_short_and_long_rows_are_those_of_their_directions():
    rows = torch.tensor([[[3e-9, 0], [4e9, 0], [0, -2], [0, 0]]], dtype=torch.float64)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert greedy.cosines(rows).tolist() == [expected]
    assert greedy.cosines(rows).dtype == torch.float32


@pytest.mark.parametrize("candidates", [1, 60, 511, 512, 513, 1100])
def test_cosines_of_many_rows_are_symmetric_and_those_of_all_pairs(candidates):
    rows = rows_of(candidates, "apart", 2, candidates, 24)
    found = greedy.cosines(rows)
    assert torch.equal(found, found.transpose(-1, -2))
    for similarity, each in zip(found.numpy(), rows.numpy(), strict=True):
        assert np.abs(similarity - slow.cosines(each)).max() < 1e-6


def test_choosing_leaves_its_arguments_as_they_were():
    rows = rows_of(0, "apart", 2, 12, 5)
    similarity, weight = greedy.cosines(rows), weights_of(0, "apart", 2, 12)
    before = similarity.clone(), weight.clone()
    for order in orders(rows, weight, 6):
        assert order.shape == (2, 6)
    greedy.farthest_first(similarity, 6)
    greedy.determinantal(similarity, weight, 6)
    greedy.covering(similarity, 6, weight)
    assert torch.equal(similarity, before[0])
    assert torch.equal(weight, before[1])


def test_choosing_waits_for_no_device():
    # A meta tensor has no values: whatever would fetch one raises.
    rows, weight = torch.empty(2, 12, 5, device="meta"), torch.empty(2, 12, device="meta")
    for order in orders(rows, weight, 6):
        assert order.shape == (2, 6)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(weight.any())


@each_kind
def test_a_mask_holds_who_was_chosen(kind):
    order = greedy.farthest_first(greedy.cosines(rows_of(3, kind, 2, 20, 5)), 7)
    mask = greedy.mask_of(order, 20)
    assert [row.nonzero().flatten().tolist() for row in mask] == order.sort(-1).values.tolist()
