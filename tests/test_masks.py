"""The tensor steps that the methods share, on inputs small enough to read."""

import pytest
import torch

from llava_hvp.methods.masks import flat_neighbours, neighbours, top_k, top_k_per_block

CROSS = ((-1, 0), (1, 0), (0, -1), (0, 1))
SQUARE = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0))


def mask(patches, *chosen):
    """(1, patches) bool, true where chosen."""
    made = torch.zeros(1, patches, dtype=torch.bool)
    made[0, list(chosen)] = True
    return made


def chosen(made):
    """The patches of each tile."""
    return [row.nonzero().flatten().tolist() for row in made]


# top_k


def test_top_k_takes_the_best_of_each_row():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    assert chosen(top_k(scores, 2)) == [[1, 3], [0, 1]]


def test_top_k_ranks_negative_scores_too():
    scores = torch.tensor([[-3.0, -1.0, -2.0, 0.0]])
    assert chosen(top_k(scores, 3)) == [[1, 2, 3]]


def test_top_k_gives_ties_to_the_lower_index():
    # Long enough for a sort that is only stable by luck to show.
    assert chosen(top_k(torch.zeros(2, 1000), 400)) == [list(range(400))] * 2


def test_top_k_gives_a_tie_at_the_border_to_the_lower_index():
    scores = torch.tensor([[0.5, 1.0, 0.5, 0.2, 0.5, 1.0]])
    assert chosen(top_k(scores, 3)) == [[0, 1, 5]]
    assert chosen(top_k(scores, 4)) == [[0, 1, 2, 5]]


@pytest.mark.parametrize(("k", "count"), [(-2, 0), (0, 0), (1, 1), (4, 4), (9, 4)])
def test_top_k_of_any_count_keeps_between_none_and_all(k, count):
    made = top_k(torch.rand(3, 4), k)
    assert made.dtype == torch.bool
    assert made.sum(1).tolist() == [count] * 3


def test_top_k_takes_another_count_for_each_row():
    scores = torch.tensor([[1.0, 2.0, 3.0]]).repeat(4, 1)
    counts = torch.tensor([[0], [1], [-1], [5]])
    assert chosen(top_k(scores, counts)) == [[], [2], [], [0, 1, 2]]


def test_top_k_takes_only_from_among_the_candidates():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]])
    assert chosen(top_k(scores, 2, among=mask(5, 1, 3, 4))) == [[3, 4]]


def test_top_k_keeps_fewer_where_there_are_fewer_candidates():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]])
    assert chosen(top_k(scores, 4, among=mask(5, 1, 3))) == [[1, 3]]
    assert chosen(top_k(scores, 4, among=mask(5))) == [[]]


def test_top_k_gives_ties_among_candidates_to_the_lower_index():
    assert chosen(top_k(torch.ones(1, 6), 2, among=mask(6, 2, 4, 5))) == [[2, 4]]


def test_top_k_leaves_scores_and_candidates_as_they_were():
    scores, among = torch.tensor([[3.0, 1.0, 2.0]]), mask(3, 1, 2)
    assert chosen(top_k(scores, 1, among=among)) == [[2]]
    assert scores.tolist() == [[3.0, 1.0, 2.0]]
    assert chosen(among) == [[1, 2]]


# top_k_per_block


def test_every_block_keeps_its_own_best():
    # 4 x 4 patches in blocks of 2 x 2; scores rise along the raster.
    scores = torch.arange(16.0).view(1, 16)
    assert chosen(top_k_per_block(scores, (4, 4), (2, 2), 1)) == [[5, 7, 13, 15]]
    assert chosen(top_k_per_block(-scores, (4, 4), (2, 2), 1)) == [[0, 2, 8, 10]]
    assert chosen(top_k_per_block(scores, (4, 4), (2, 2), 2)) == [[4, 5, 6, 7, 12, 13, 14, 15]]


def test_tiles_have_blocks_of_their_own():
    scores = torch.stack([torch.arange(16.0), -torch.arange(16.0)])
    assert chosen(top_k_per_block(scores, (4, 4), (2, 2), 1)) == [[5, 7, 13, 15], [0, 2, 8, 10]]


def test_blocks_need_not_be_square_and_neither_need_the_grid():
    # 2 x 6 patches in blocks of 1 row and 3 columns, then of 2 rows and 2 columns.
    scores = torch.arange(12.0).view(1, 12)
    assert chosen(top_k_per_block(scores, (2, 6), (1, 3), 1)) == [[2, 5, 8, 11]]
    assert chosen(top_k_per_block(scores, (2, 6), (2, 2), 1)) == [[7, 9, 11]]


def test_blocks_at_the_right_and_bottom_edge_are_smaller():
    # 3 x 5 patches in blocks of 2 x 2: the columns are cut 2, 2, 1 and the rows 2, 1.
    scores = torch.arange(15.0).view(1, 15)
    assert chosen(top_k_per_block(scores, (3, 5), (2, 2), 1)) == [[6, 8, 9, 11, 13, 14]]
    assert chosen(top_k_per_block(-scores, (3, 5), (2, 2), 1)) == [[0, 2, 4, 10, 12, 14]]


def test_a_small_block_at_the_edge_keeps_all_and_nothing_from_outside_the_grid():
    # Negative scores: a padding of zeros would win every one of these blocks.
    scores = -torch.arange(1.0, 16.0).view(1, 15)
    made = top_k_per_block(scores, (3, 5), (2, 2), 2)
    assert made.shape == (1, 15)
    assert chosen(made) == [[0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14]]
    assert top_k_per_block(scores, (3, 5), (2, 2), 4).all()


def test_a_block_larger_than_the_grid_is_the_whole_grid():
    scores = torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0, 0.0]])
    assert chosen(top_k_per_block(scores, (2, 3), (7, 7), 2)) == [[1, 3]]


def test_a_block_far_larger_than_the_grid_costs_no_memory():
    scores = torch.arange(16.0)[None]
    assert top_k_per_block(scores, (4, 4), (10**9, 10**9), 1).nonzero().tolist() == [[0, 15]]


def test_a_block_of_one_patch_keeps_it():
    assert top_k_per_block(torch.rand(2, 12), (3, 4), (1, 1), 1).all()


def test_ties_in_a_block_go_to_the_lower_index():
    made = top_k_per_block(torch.zeros(1, 16), (4, 4), (2, 2), 2)
    assert chosen(made) == [[0, 1, 2, 3, 8, 9, 10, 11]]
    made = top_k_per_block(torch.zeros(1, 16), (4, 4), (2, 2), 3)
    assert chosen(made) == [[0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14]]


def test_a_block_without_candidates_keeps_none():
    among = mask(16, 0, 1, 2, 4, 5, 10)  # all of the first block, none of the last but one
    scores = torch.arange(16.0).view(1, 16)
    assert chosen(top_k_per_block(scores, (4, 4), (2, 2), 1, among)) == [[2, 5, 10]]
    assert chosen(top_k_per_block(scores, (4, 4), (2, 2), 3, among)) == [[1, 2, 4, 5, 10]]


@pytest.mark.parametrize("k", [0, -3])
def test_no_block_keeps_any_of_none(k):
    assert not top_k_per_block(torch.rand(2, 15), (3, 5), (2, 2), k).any()


# neighbours


def test_neighbours_of_an_inner_patch():
    # 4 x 5 patches; 7 is in row 1 and column 2.
    assert chosen(neighbours(mask(20, 7), (4, 5), CROSS)) == [[2, 6, 8, 12]]
    assert chosen(neighbours(mask(20, 7), (4, 5), SQUARE)) == [[1, 2, 3, 6, 8, 11, 12, 13]]


@pytest.mark.parametrize(
    ("patch", "cross", "square"),
    [
        (0, [1, 5], [1, 5, 6]),
        (4, [3, 9], [3, 8, 9]),
        (15, [10, 16], [10, 11, 16]),
        (19, [14, 18], [13, 14, 18]),
        (2, [1, 3, 7], [1, 3, 6, 7, 8]),
        (5, [0, 6, 10], [0, 1, 6, 10, 11]),
        (9, [4, 8, 14], [3, 4, 8, 13, 14]),
        (17, [12, 16, 18], [11, 12, 13, 16, 18]),
    ],
)
def test_neighbours_stop_at_edges_and_corners(patch, cross, square):
    assert chosen(neighbours(mask(20, patch), (4, 5), CROSS)) == [cross]
    assert chosen(neighbours(mask(20, patch), (4, 5), SQUARE)) == [square]


def test_neighbours_of_several_patches_are_united_and_may_be_patches_of_the_mask():
    assert chosen(neighbours(mask(9, 3, 4), (3, 3), ((0, -1), (0, 1)))) == [[3, 4, 5]]


def test_neighbours_of_one_tile_stay_in_it():
    both = torch.cat([mask(9, 8), mask(9)])
    assert chosen(neighbours(both, (3, 3), CROSS)) == [[5, 7], []]


def test_neighbours_at_any_distance_and_in_any_direction():
    assert chosen(neighbours(mask(20, 1), (4, 5), ((2, 3),))) == [[14]]
    assert chosen(neighbours(mask(20, 14), (4, 5), ((-2, -3),))) == [[1]]
    assert chosen(neighbours(mask(20, 14), (4, 5), ((1, -4),))) == [[15]]


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 9, 30])
def test_an_offset_beyond_the_grid_reaches_nothing(steps):
    everywhere = torch.ones(2, 16, dtype=torch.bool)
    offsets = ((steps, 0), (-steps, 0), (0, steps), (0, -steps), (steps, -steps))
    assert not neighbours(everywhere, (4, 4), offsets).any()


def test_neighbours_in_a_single_row_have_no_above_and_below():
    assert chosen(neighbours(mask(5, 2), (1, 5), SQUARE)) == [[1, 3]]
    assert chosen(neighbours(mask(5, 2), (5, 1), SQUARE)) == [[1, 3]]


def test_without_offsets_there_are_no_neighbours():
    assert not neighbours(mask(9, 4), (3, 3), ()).any()
    assert not flat_neighbours(mask(9, 4), (3, 3), ()).any()


# flat_neighbours


def test_flat_neighbours_equal_those_on_the_grid_inside_of_it():
    for patch in (6, 7, 8, 11, 12, 13):
        start = mask(20, patch)
        for offsets in (CROSS, SQUARE):
            flat, on_grid = (find(start, (4, 5), offsets) for find in (flat_neighbours, neighbours))
            assert torch.equal(flat, on_grid)


def test_flat_neighbours_wrap_from_one_row_to_the_next():
    # 9 ends row 1 of five columns, 10 begins row 2.
    assert chosen(flat_neighbours(mask(20, 9), (4, 5), CROSS)) == [[4, 8, 10, 14]]
    assert chosen(flat_neighbours(mask(20, 10), (4, 5), CROSS)) == [[5, 9, 11, 15]]


def test_flat_neighbours_clamp_to_the_first_and_the_last_patch():
    assert chosen(flat_neighbours(mask(20, 3), (4, 5), CROSS)) == [[0, 2, 4, 8]]
    assert chosen(flat_neighbours(mask(20, 16), (4, 5), CROSS)) == [[11, 15, 17, 19]]
    # The corners reach themselves.
    assert chosen(flat_neighbours(mask(20, 0), (4, 5), CROSS)) == [[0, 1, 5]]
    assert chosen(flat_neighbours(mask(20, 19), (4, 5), CROSS)) == [[14, 18, 19]]


def test_flat_neighbours_of_one_tile_stay_in_it():
    both = torch.cat([mask(9, 8), mask(9)])
    assert chosen(flat_neighbours(both, (3, 3), CROSS)) == [[5, 7, 8], []]


def test_flat_neighbours_that_many_patches_share_are_reached_once():
    # Clamping sends the whole first row to patch 0: 512 times, which a byte would count as none.
    made = flat_neighbours(mask(1024, *range(512)), (2, 512), ((-1, 0),))
    assert made.dtype == torch.bool
    assert chosen(made) == [[0]]
