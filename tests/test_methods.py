"""The methods keep what the slow rules of reference.py keep, and refuse what makes no sense."""

import dataclasses
import gc
import random
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import reference
import torch

from llava_hvp import (
    HIVTP,
    HiPrune,
    LlavaHvpError,
    Method,
    Random,
    Selection,
    Uniform,
    VisionContext,
    VisionMethod,
    get_method,
    list_methods,
)
from llava_hvp.errors import ContextError, LayerError, OptionError, ScoreError
from llava_hvp.methods import method_class
from llava_hvp.methods.hipruneplus import HiPrunePlus
from llava_hvp.runtime import PruningConfig

DEPTH, SELECT = 24, 23
GRIDS = [(8, 8), (12, 12), (16, 16), (24, 24), (27, 27), (32, 32), (6, 10), (9, 4), (5, 7)]
SCORES = ["continuous", "ties"]
CASES = 30  # for each grid, each kind of scores and each group of methods below

each_grid = pytest.mark.parametrize("grid", GRIDS, ids="{0[0]}x{0[1]}".format)
each_kind = pytest.mark.parametrize("kind", SCORES)
each_method = pytest.mark.parametrize("name", list_methods(VisionMethod))


class Draw:
    """Everything that a case draws, from one seed."""

    def __init__(self, *seed):
        self.options = random.Random(repr(seed))
        self.tensors = torch.Generator().manual_seed(self.options.getrandbits(40))

    def scores(self, tiles, patches, kind):
        """(tiles, patches) float32; with ties, only a few levels, down to a single one."""
        if kind == "continuous":
            return torch.rand(tiles, patches, generator=self.tensors)
        levels = self.options.randint(1, 4)
        return torch.randint(levels, (tiles, patches), generator=self.tensors) / 8

    def budget(self, patches):
        """An `r_max` from one patch to all of them; often tiny, where roundings show."""
        return self.options.choice(
            [
                self.options.randint(1, 5) / patches,
                self.options.uniform(1e-6, 1),
                self.options.uniform(0, 0.2) + 1e-6,
                self.options.choice([0.75, 0.5, 0.4, 0.25, 0.111, 1, 1.0]),
            ]
        )


def context_for(method, draw, grid, tiles, kind="continuous", **changes):
    """A context with what the method needs; `tiles` is the tiles of each image."""
    patches, total = grid[0] * grid[1], sum(tiles)
    needs = method.needs(DEPTH, SELECT)

    def normal(*shape):
        return torch.randn(*shape, generator=draw.tensors)

    fields = {
        "grid": grid,
        "depth": DEPTH,
        "feature_layer": SELECT,
        "tiles": tiles,
        "received_attention": {
            layer: draw.scores(total, patches, kind) for layer in needs.received_attention
        },
        "cls_attention": {
            layer: draw.scores(total, patches, kind) for layer in needs.cls_attention
        },
        "features": torch.rand(total, patches, 4) if needs.features else None,
        "relevance": draw.scores(total, patches, kind) if needs.relevance else None,
        "keys": {layer: normal(total, 1 + patches, 8) for layer in needs.keys},
        "queries": {layer: normal(total, 1 + patches, 8) for layer in needs.queries},
        "heads": 2,
        "projected": normal(total, patches, 6) if needs.projected else None,
        "words": tuple(normal(3, 6) for _ in tiles) if needs.words else None,
        "padding": torch.zeros(total, patches, dtype=torch.bool) if needs.padding else None,
        "mosaics": tuple((1, t - 1) if t > 1 else None for t in tiles) if needs.mosaics else None,
    }
    return VisionContext(**(fields | changes))


def sent(selection):
    """Tokens of each tile, those included that stand at no patch."""
    extras = torch.tensor(selection.extras, device=selection.keep.device)
    return (selection.keep.sum(1) + extras).tolist()


def patches_of(mask):
    """The patches of each tile, from a (T, N) mask."""
    return [set(row.nonzero().flatten().tolist()) for row in mask]


def assert_sound(selection, method, context):
    """Masks of the right shape; roles disjoint, declared, and together what is kept."""
    shape = (context.total_tiles, context.patches)
    assert tuple(selection.roles) == method.roles
    for mask in (selection.keep, *selection.roles.values()):
        assert (mask.dtype, tuple(mask.shape)) == (torch.bool, shape)
    assert torch.equal(sum(mask.int() for mask in selection.roles.values()), selection.keep.int())


def assert_keeps(method, context, expected):
    """The selection equals the reference's roles, tile for tile."""
    case = f"{method} on {context.grid}, tiles {context.tiles}"
    selection = method.select(context)
    assert_sound(selection, method, context)
    for tile, (keep, roles) in enumerate(zip(patches_of(selection.keep), expected, strict=True)):
        assert keep == reference.kept(roles), f"{case}: tile {tile}"
        if len(keep) == context.patches:
            continue  # where everything is kept, roles mean nothing
        found = {role: patches_of(mask)[tile] for role, mask in selection.roles.items()}
        assert found == roles, f"{case}: tile {tile}"


def assert_same_mix(alone, batch, tiles):
    """What flows into these tiles' tokens in a batch is what does when they come alone."""
    assert alone.extras == tuple(batch.extras[tile] for tile in tiles)
    if alone.mix is None:
        nothing = batch.mix is None or not batch.mix.added[tiles].any()
        assert nothing
        assert not any(alone.extras)
        return
    for name in ("added", "extra", "rank"):
        own, among = getattr(alone.mix, name), getattr(batch.mix, name)
        assert (own is None) == (among is None)
        if own is not None:
            assert torch.allclose(own.float(), among[tiles].float(), atol=1e-6), name


def rows(context, layer):
    return context.received_attention[layer].tolist()


# Fast against slow


def hivtp_sizes_by_hand(draw, grid, kind):
    # torch adds up more than four layers in an order of its own; sums of ties are exact in any.
    layers = draw.options.randint(1, 4 if kind == "continuous" else 8)
    return {
        "regions": draw.options.randint(1, 5),
        "window": draw.options.choice(["auto", "auto", draw.options.randint(1, max(grid) + 2)]),
        "layers": tuple(draw.options.sample(range(1, SELECT + 1), layers)),
    }


def expect_hivtp(method, context, budgets):
    tiles = zip(*(rows(context, layer) for layer in method.layers), strict=True)
    return [
        reference.hivtp(layers, context.grid, budget, method.regions, method.window)
        for layers, budget in zip(tiles, budgets, strict=True)
    ]


@each_kind
@each_grid
def test_hivtp_keeps_what_the_slow_rule_keeps(grid, kind):
    patches, compared, refused = grid[0] * grid[1], 0, 0
    for case in range(CASES):
        draw = Draw("hivtp", grid, kind, case)
        r_max, tiles = draw.budget(patches), draw.options.randint(1, 3)
        method = HIVTP(r_max=r_max, **hivtp_sizes_by_hand(draw, grid, kind))
        budget = reference.p_max(patches, r_max=r_max)
        context = context_for(method, draw, grid, (tiles,), kind)
        if r_max == 1:
            context = dataclasses.replace(
                context,
                received_attention={n: draw.scores(tiles, patches, kind) for n in method.layers},
            )
        window = method.window
        if window != "auto" and -(-grid[0] // window) * -(-grid[1] // window) > budget:
            with pytest.raises(OptionError, match=f"window={window}"):
                method.select(context)
            refused += 1
            continue
        assert_keeps(method, context, expect_hivtp(method, context, [budget] * tiles))
        assert method.select(context).keep.sum(1).max() <= budget
        compared += 1
    assert compared > refused  # else the cases are drawn badly


@each_kind
@each_grid
def test_hivtp_by_the_papers_knobs_keeps_what_the_slow_rule_keeps(grid, kind):
    for case in range(CASES):
        draw = Draw("knobs", grid, kind, case)
        k = draw.options.choice([1, 14, 25, 50, 100, draw.options.uniform(0.1, 100)])
        sizes = hivtp_sizes_by_hand(draw, grid, kind)
        sizes["window"] = draw.options.choice([None, draw.options.randint(1, max(grid) + 2)])
        method = HIVTP(k=k, **sizes)
        context = context_for(method, draw, grid, (2,), kind)
        tiles = zip(*(rows(context, layer) for layer in method.layers), strict=True)
        expected = [
            reference.hivtp_by_k(layers, grid, k, method.window, method.regions) for layers in tiles
        ]
        assert_keeps(method, context, expected)


def hiprune_options(draw):
    return {
        "alpha": draw.options.choice([0.1, 0.1, 0, 1, 1, draw.options.uniform(0, 1)]),
        "object_layer": draw.options.choice([None, 1, 9, SELECT]),
        # Only the square can overflow a budget by much: an anchor is a fifth of alpha's share.
        "buffer": draw.options.choice(["cross", "cross", "square", "square", "row", "none"]),
        "variant": draw.options.choice(["paper", "code"]),
    }


def expect_hiprune(method, context, budgets):
    options = {"alpha": method.alpha, "buffer": method.buffer, "variant": method.variant}
    middle, deep = rows(context, method.object_layer or 9), rows(context, SELECT)
    if not isinstance(method, HiPrunePlus):
        tiles = zip(middle, deep, budgets, strict=True)
        return [reference.hiprune(a, b, context.grid, budget, **options) for a, b, budget in tiles]
    options |= {"beta": method.beta, "extra": method.extra}
    tiles = zip(middle, deep, context.relevance.tolist(), budgets, strict=True)
    return [
        reference.hiprune_plus(a, b, c, context.grid, budget, **options)
        for a, b, c, budget in tiles
    ]


def drawn_hiprune(draw, grid, kind, make):
    """A method with drawn options, a context for it, and its budget."""
    patches = grid[0] * grid[1]
    budget = draw.options.choice(
        [draw.options.randint(1, 5), draw.options.randint(1, patches - 1), patches // 4]
    )
    method = make(r_max=budget / patches, **hiprune_options(draw))
    context = context_for(method, draw, grid, (draw.options.randint(1, 3),), kind)
    return method, context, budget


@each_kind
@each_grid
def test_hiprune_keeps_what_the_slow_rule_keeps_and_exactly_the_budget(grid, kind):
    overflows = 0
    for case in range(CASES):
        draw = Draw("hiprune", grid, kind, case)
        method, context, budget = drawn_hiprune(draw, grid, kind, HiPrune)
        expected = expect_hiprune(method, context, [budget] * context.total_tiles)
        assert_keeps(method, context, expected)
        assert method.select(context).keep.sum(1).tolist() == [budget] * context.total_tiles
        overflows += sum(not roles["register"] for roles in expected)
    assert overflows  # anchors and buffers alone have filled a budget


@each_kind
@each_grid
def test_hiprune_plus_keeps_what_the_slow_rule_keeps_and_exactly_the_budget(grid, kind):
    crowded_out = 0
    for case in range(CASES):
        draw = Draw("hiprune++", grid, kind, case)
        beta = draw.options.choice([0.1, 0.1, 0, 1, draw.options.uniform(0, 1)])
        extra = draw.options.random() < 0.3

        def make(beta=beta, extra=extra, **options):
            return HiPrunePlus(beta=beta, extra=extra, **options)

        method, context, budget = drawn_hiprune(draw, grid, kind, make)
        expected = expect_hiprune(method, context, [budget] * context.total_tiles)
        assert_keeps(method, context, expected)
        on_top = round(beta * budget) if extra else 0
        size = min(budget + on_top, context.patches)
        assert method.select(context).keep.sum(1).tolist() == [size] * context.total_tiles
        crowded_out += any(
            not extra and len(roles["text"]) < round(beta * budget) for roles in expected
        )
    assert crowded_out  # anchors and buffers have taken from the prompt's share


@each_grid
def test_uniform_keeps_what_the_slow_rule_keeps(grid):
    patches = grid[0] * grid[1]
    for budget in range(1, patches + 1, 1 + patches // 200):
        method = Uniform(num_tokens=2 * budget)
        expected = [reference.uniform(patches, budget)] * 2
        assert_keeps(method, VisionContext(grid, tiles=(2,)), expected)
        assert len(reference.kept(expected[0])) == budget


@each_kind
def test_num_tokens_gives_each_tile_the_share_of_its_image(kind):
    for case in range(2 * CASES):
        draw = Draw("num_tokens", kind, case)
        grid = draw.options.choice([(8, 8), (12, 12), (6, 10), (5, 7)])
        images = tuple(draw.options.choices([1, 2, 3, 5], k=draw.options.randint(1, 4)))
        patches = grid[0] * grid[1]
        tokens = draw.options.choice(
            [max(images), draw.options.randint(max(images), 60), 200, patches * max(images)]
        )
        shares = reference.shares(tokens, images)
        budgets = [reference.p_max(patches, share=share) for share in shares]
        options = hiprune_options(draw)
        layers = hivtp_sizes_by_hand(draw, grid, kind)["layers"]
        for method, expect in [
            (HIVTP(num_tokens=tokens, layers=layers), expect_hivtp),
            (HiPrune(num_tokens=tokens, **options), expect_hiprune),
            (HiPrunePlus(num_tokens=tokens, **options), expect_hiprune),
        ]:
            context = context_for(method, draw, grid, images, kind)
            assert_keeps(method, context, expect(method, context, budgets))
        expected = [reference.uniform(patches, budget) for budget in budgets]
        assert_keeps(Uniform(num_tokens=tokens), VisionContext(grid, tiles=images), expected)


def test_hivtp_averages_its_layers_in_float32_before_it_ranks():
    # Two layers that disagree: the mean has a winner that neither layer's own best is.
    first, second = torch.zeros(1, 16), torch.zeros(1, 16)
    first[0, 3], second[0, 7] = 0.5, 0.5
    first[0, 9] = second[0, 9] = 0.375
    method = HIVTP(r_max=1 / 16, layers=(2, 5))
    context = VisionContext((4, 4), {2: first, 5: second}, DEPTH, SELECT)
    assert patches_of(method.select(context).keep) == [{9}]


def test_hivtp_ties_are_those_of_the_mean_in_float32():
    # Patch 12 is ahead by less than float32 can add to 0.5, whatever type the scores came in.
    large, small = torch.full((1, 16), 0.5), torch.zeros(1, 16)
    small[0, 12] = 1e-9
    for dtype in (torch.float32, torch.float64):
        received = {2: large.to(dtype), 5: small.to(dtype)}
        context = VisionContext((4, 4), received, DEPTH, SELECT)
        method = HIVTP(r_max=1 / 16, layers=(2, 5))
        assert reference.mean([large[0].tolist(), small[0].tolist()]) == [0.25] * 16
        assert patches_of(method.select(context).keep) == [{0}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_method
def test_selection_works_on_scores_of_any_float_type(name, dtype):
    grid, draw = (12, 12), Draw("dtype", name)
    method = get_method(name, r_max=0.3)
    context = context_for(method, draw, grid, (2,))
    typed = dataclasses.replace(
        context,
        received_attention={layer: s.to(dtype) for layer, s in context.received_attention.items()},
        relevance=None if context.relevance is None else context.relevance.to(dtype),
    )
    # What the type rounds away is gone, and nothing else changes: ranks are taken in float32.
    rounded = dataclasses.replace(
        typed,
        received_attention={layer: s.float() for layer, s in typed.received_attention.items()},
        relevance=None if typed.relevance is None else typed.relevance.float(),
    )
    assert_sound(method.select(typed), method, typed)
    assert torch.equal(method.select(typed).keep, method.select(rounded).keep)


def test_scores_that_differ_in_float64_only_are_ties():
    scores = torch.full((1, 16), 0.5, dtype=torch.float64)
    scores[0, 12] += 1e-12
    assert reference.float32(scores[0].tolist()) == [0.5] * 16
    context = VisionContext((4, 4), {9: scores, SELECT: scores}, DEPTH, SELECT)
    assert patches_of(HiPrune(r_max=0.25).select(context).keep) == [{0, 1, 2, 3}]


@each_method
def test_scores_in_any_memory_layout_give_the_same_selection(name):
    grid, draw = (6, 10), Draw("layout", name)
    method = get_method(name, r_max=0.3)
    context = context_for(method, draw, grid, (3,))

    def transposed(scores):
        return scores.t().contiguous().t()

    def with_cls_column(scores):
        return torch.nn.functional.pad(scores, (1, 0))[:, 1:]

    for laid_out in (transposed, with_cls_column):
        other = dataclasses.replace(
            context,
            received_attention={
                layer: laid_out(s) for layer, s in context.received_attention.items()
            },
            relevance=None if context.relevance is None else laid_out(context.relevance),
        )
        assert torch.equal(method.select(other).keep, method.select(context).keep)


# What holds for every method, those included that are added later


@each_kind
@each_method
def test_no_tile_keeps_more_than_p_max(name, kind):
    for case in range(CASES):
        draw = Draw("p_max", name, kind, case)
        grid = draw.options.choice(GRIDS)
        r_max = draw.budget(grid[0] * grid[1])
        method = get_method(name, r_max=r_max)
        context = context_for(method, draw, grid, (draw.options.randint(1, 3),), kind)
        budget = reference.p_max(context.patches, r_max=r_max)
        selection = method.select(context)
        assert_sound(selection, method, context)
        if method.of_image:
            most = method.budget(context.patches, context.total_tiles)
            assert 0 <= sum(sent(selection)) <= most, f"{method} on {grid}"
            assert most <= max(1, r_max * context.total_tiles * context.patches)
            continue
        assert method.budget(context.patches) == budget
        for count in sent(selection):
            assert 1 <= count <= budget, f"{method} on {grid}"


@each_kind
@each_method
def test_tiles_of_a_batch_are_selected_as_one_at_a_time(name, kind):
    for case in range(CASES // 2):
        draw = Draw("batch", name, kind, case)
        grid, tiles = draw.options.choice(GRIDS), draw.options.randint(2, 5)
        method = get_method(name, r_max=draw.budget(grid[0] * grid[1]))
        context = context_for(method, draw, grid, (1,) * tiles, kind)
        batch = method.select(context)
        for tile in range(tiles):
            alone = method.select(context.rows(torch.tensor([tile]), (1,)))
            for role, mask in alone.roles.items():
                assert torch.equal(mask[0], batch.roles[role][tile]), f"{method} on {grid}: {role}"
            assert_same_mix(alone, batch, [tile])


@each_kind
@each_method
def test_images_of_a_batch_are_selected_as_one_at_a_time(name, kind):
    for case in range(CASES // 2):
        draw = Draw("images", name, kind, case)
        grid, images = draw.options.choice([(8, 8), (6, 10)]), (1, 5, 3, 5)
        method = get_method(name, num_tokens=draw.options.randint(5, 200))
        context = context_for(method, draw, grid, images, kind)
        batch, start = method.select(context), 0
        for tiles in images:
            own = torch.arange(start, start + tiles)
            alone = method.select(context.rows(own, (tiles,)))
            assert torch.equal(alone.keep, batch.keep[own]), f"{method} on {grid}"
            assert_same_mix(alone, batch, own.tolist())
            start += tiles


@each_grid
@each_method
def test_r_max_of_one_keeps_all_without_looking_at_scores(name, grid):
    for r_max in (1, 1.0):
        method = get_method(name, r_max=r_max)
        needs = method.needs(DEPTH, SELECT)
        assert method.keeps_all
        assert (needs.received_attention, needs.cls_attention, needs.features, needs.relevance) == (
            (),
            (),
            False,
            None,
        )
        selection = method.select(VisionContext(grid, tiles=(2,)))
        assert selection.keep.shape == (2, grid[0] * grid[1])
        assert selection.keep.all()


@each_method
def test_a_budget_below_one_patch_sends_one(name):
    method = get_method(name, r_max=1e-9)
    context = context_for(method, Draw("one", name), (24, 24), (2,))
    assert sent(method.select(context)) == ([0, 1] if method.of_image else [1, 1])
    alone = context_for(method, Draw("one", name), (24, 24), (1, 1))
    assert sent(method.select(alone)) == [1, 1]


@each_method
def test_a_tile_is_never_given_more_than_its_patches(name):
    method = get_method(name, num_tokens=1500)
    budgets = [method.budget(576, tiles) for tiles in (1, 2, 3, 5)]
    assert budgets == ([576, 1152, 1500, 1500] if method.of_image else [576, 576, 500, 300])


@each_method
def test_without_a_budget_half_of_the_patches_stay(name):
    assert method_class(name)() == get_method(name, r_max=0.5)
    assert get_method(name).budget(576) == 288


@each_method
def test_selecting_again_on_tied_scores_gives_the_same_selection(name):
    method = get_method(name, r_max=0.25)
    context = context_for(method, Draw("again", name), (12, 12), (2,), "ties")
    first = method.select(context)
    again = method.select(context)
    unchecked = method.select_unchecked(context)
    assert torch.equal(first.keep, again.keep)
    assert torch.equal(first.keep, unchecked.keep)


@each_method
def test_selecting_leaves_the_scores_as_they_were(name):
    method = get_method(name, r_max=0.25)
    context = context_for(method, Draw("untouched", name), (12, 12), (2,))
    before = {layer: scores.clone() for layer, scores in context.received_attention.items()}
    relevance = None if context.relevance is None else context.relevance.clone()
    assert method.select(context).keep.any()
    assert all(
        torch.equal(context.received_attention[layer], scores) for layer, scores in before.items()
    )
    assert relevance is None or torch.equal(context.relevance, relevance)


@each_method
def test_a_method_is_rebuilt_from_its_options_and_cannot_be_changed(name):
    method = get_method(name, num_tokens=64)
    assert get_method(name, **dataclasses.asdict(method)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.r_max = 0.9


# Sizes and layers, in numbers


@pytest.mark.parametrize(
    ("r_max", "p_max", "window", "per_region"),
    [
        (0.75, 432, 2, 72),
        (0.50, 288, 2, 36),
        (0.40, 230, 2, 21),
        (0.25, 144, 3, 20),
        (0.111, 64, 4, 7),
    ],
)
def test_hivtp_sizes_are_those_of_the_table(r_max, p_max, window, per_region):
    method = HIVTP(r_max=r_max)
    assert method.budget(576) == p_max
    assert method.sizes((24, 24), p_max) == (per_region, window)
    assert reference.p_max(576, r_max=r_max) == p_max
    assert reference.hivtp_window((24, 24), p_max) == window
    assert reference.hivtp_per_region((24, 24), p_max, window, 2) == per_region


@each_grid
def test_hivtp_sizes_are_those_of_the_slow_rule_at_every_budget(grid):
    for budget in range(1, grid[0] * grid[1] + 1):
        for regions in range(1, 6):
            window = reference.hivtp_window(grid, budget)
            per_region = reference.hivtp_per_region(grid, budget, window, regions)
            assert HIVTP(regions=regions).sizes(grid, budget) == (per_region, window)


@pytest.mark.parametrize(("k", "window", "per_region"), [(50, 2, 72), (25, 2, 36), (15, 2, 21)])
def test_hivtp_knobs_of_the_paper_give_the_sizes_of_the_table(k, window, per_region):
    assert HIVTP(k=k, window=window).sizes((24, 24), 576) == (per_region, window)
    assert HIVTP(k=k, window=None).sizes((24, 24), 576) == (per_region, None)


def test_hivtp_without_the_local_stage_keeps_k_percent_of_every_region():
    method = HIVTP(k=25, window=None)
    context = context_for(method, Draw("no local"), (24, 24), (1,))
    keep = method.select(context).keep.view(2, 12, 2, 12)
    assert keep.sum((1, 3)).tolist() == [[36, 36], [36, 36]]


def test_hivtp_adds_nothing_from_a_window_that_is_kept_whole():
    # Every score of the first window is above all others, so the global stage keeps all of it.
    scores = torch.linspace(0, 1, 64).flip(0).view(1, 8, 8).clone()
    scores[0, :2, :2] = 2
    context = VisionContext((8, 8), {9: scores.flatten(1)}, DEPTH, SELECT)
    method = HIVTP(k=25, window=2, layers=(9,))
    local = method.select(context).roles["local"].view(8, 8)
    assert local[:2, :2].sum() == 0
    assert local.sum() < 16


@pytest.mark.parametrize(
    ("budget", "anchors"), [(192, 4), (128, 3), (64, 1), (25, 0), (24, 0), (75, 2), (1, 0)]
)
def test_hiprune_rounds_its_anchors_as_python_does(budget, anchors):
    method = HiPrune(num_tokens=budget, buffer="none")
    context = context_for(method, Draw("anchors"), (24, 24), (1,))
    assert method.select(context).roles["anchor"].sum() == anchors


def test_hiprune_neighbours_stop_at_an_edge_on_paper_and_wrap_in_the_code():
    scores = torch.zeros(1, 36)
    scores[0, 11] = 1  # the last patch of the second row of six
    context = VisionContext((6, 6), {9: scores, SELECT: scores}, DEPTH, SELECT)
    options = {"r_max": 0.25, "alpha": 0.6}  # a budget of 9, a single anchor
    on_paper = HiPrune(**options).select(context).roles
    in_code = HiPrune(variant="code", **options).select(context).roles
    assert patches_of(on_paper["anchor"]) == patches_of(in_code["anchor"]) == [{11}]
    assert patches_of(on_paper["buffer"]) == [{5, 10, 17}]
    assert patches_of(in_code["buffer"]) == [{5, 10, 12, 17}]


def test_hiprune_code_clamps_an_anchor_in_the_first_row_to_the_first_patch():
    scores = torch.zeros(1, 36)
    scores[0, 3] = 1
    context = VisionContext((6, 6), {9: scores, SELECT: scores}, DEPTH, SELECT)
    roles = HiPrune(r_max=0.25, alpha=0.6, variant="code").select(context).roles
    assert patches_of(roles["buffer"]) == [{0, 2, 4, 9}]


def test_hiprune_plus_takes_the_prompts_share_out_of_the_budget_or_on_top():
    inside = HiPrunePlus(num_tokens=192)
    context = context_for(inside, Draw("share"), (24, 24), (1,))
    on_top = dataclasses.replace(inside, extra=True)
    assert inside.select(context).keep.sum() == 192
    assert inside.select(context).roles["text"].sum() == 19
    assert on_top.select(context).keep.sum() == 192 + 19
    assert on_top.select(context).roles["text"].sum() == 19


@pytest.mark.parametrize(
    ("depth", "feature_layer", "hivtp", "hiprune"),
    [
        (24, 23, (7, 8, 9, 10), (9, 23)),
        (12, 11, (4, 5), (4, 11)),
        (32, 31, (9, 11, 12, 13), (12, 31)),
        (24, 8, (7, 8), (8,)),
        (24, 9, (7, 8, 9), (9,)),
        (1, 1, (1,), (1,)),
    ],
)
def test_default_layers_scale_with_the_depth_and_stop_at_select(
    depth, feature_layer, hivtp, hiprune
):
    assert HIVTP().needs(depth, feature_layer).received_attention == hivtp
    assert HiPrune().needs(depth, feature_layer).received_attention == hiprune
    assert HiPrunePlus().needs(depth, feature_layer).received_attention == hiprune
    assert tuple(reference.default_layers((7, 8, 9, 10), depth, feature_layer)) == hivtp


def test_default_layers_equal_the_slow_rule_at_every_depth():
    for depth in range(1, 49):
        for feature_layer in range(1, depth + 1):
            layers = HIVTP().needs(depth, feature_layer).received_attention
            assert list(layers) == reference.default_layers((7, 8, 9, 10), depth, feature_layer)
            middle = reference.default_layers((9,), depth, feature_layer)[0]
            assert set(HiPrune().needs(depth, feature_layer).received_attention) == {
                middle,
                feature_layer,
            }


def test_a_method_needs_what_it_reads_and_no_more():
    for text in ("clip", "llm"):
        assert HiPrunePlus(text=text).needs(DEPTH, SELECT).relevance == text
    for method in (HIVTP(), HiPrune()):
        needs = method.needs(DEPTH, SELECT)
        assert (needs.cls_attention, needs.features, needs.relevance) == ((), False, None)
    assert HIVTP(layers=(7, 8, 9)).needs(DEPTH, SELECT).received_attention == (7, 8, 9)
    assert HiPrune(object_layer=5).needs(DEPTH, SELECT).received_attention == (5, SELECT)


@pytest.mark.parametrize("method", [Random(), Uniform()], ids=["random", "uniform"])
def test_the_references_capture_nothing(method):
    # Not even the encoder's depth has to be known.
    for depth, feature_layer in ((DEPTH, SELECT), (None, None)):
        needs = method.needs(depth, feature_layer)
        assert (needs.received_attention, needs.cls_attention, needs.features, needs.relevance) == (
            (),
            (),
            False,
            None,
        )


@each_grid
def test_random_keeps_exactly_the_budget(grid):
    patches = grid[0] * grid[1]
    for budget in range(1, patches + 1, 7):
        keep = Random(num_tokens=budget).select(VisionContext(grid)).keep
        assert keep.sum(1).tolist() == [budget]


def test_random_draws_by_its_seed_and_another_patch_set_for_each_tile():
    context = VisionContext((24, 24), tiles=(5,))
    keep = Random(seed=3).select(context).keep
    assert torch.equal(keep, Random(seed=3).select(context).keep)
    assert not torch.equal(keep, Random(seed=4).select(context).keep)
    assert len({tuple(sorted(tile)) for tile in patches_of(keep)}) == 5


def test_random_draws_the_same_for_tile_i_in_any_batch():
    grid = (24, 24)
    five = Random(seed=1).select(VisionContext(grid, tiles=(5,))).keep
    for images in ((1,), (3,), (1, 1, 1), (2, 5, 1), (5, 5)):
        keep = Random(seed=1).select(VisionContext(grid, tiles=images)).keep
        expected = torch.cat([five[:tiles] for tiles in images])
        assert torch.equal(keep, expected), images


def test_random_leaves_torchs_own_generator_alone():
    state = torch.random.get_rng_state()
    assert Random(seed=1).select(VisionContext((8, 8))).keep.any()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_favours_no_patch():
    # 400 draws of 16 of 64: each patch is expected 100 times, with a deviation below 9.
    keep = Random(r_max=0.25).select(VisionContext((8, 8), tiles=(400,))).keep
    counts = keep.sum(0)
    assert counts.min() > 60
    assert counts.max() < 140


# Wrong input


def assert_raises(error, make, *words):
    """`make` raises `error`, one of ours, and its message has all the words."""
    assert issubclass(error, LlavaHvpError)
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("r_max", [0, -1, 1.5, float("nan"), float("inf"), "x", True, [0.5]])
@each_method
def test_a_wrong_r_max_is_refused(name, r_max):
    assert_raises(
        OptionError, lambda: get_method(name, r_max=r_max), name, f"r_max={r_max!r}", "(0, 1]"
    )


@pytest.mark.parametrize("tokens", [0, -5, 64.0, "64", True])
@each_method
def test_a_wrong_num_tokens_is_refused(name, tokens):
    words = (name, f"num_tokens={tokens!r}", "at least 1")
    assert_raises(OptionError, lambda: get_method(name, num_tokens=tokens), *words)


@each_method
def test_two_budgets_at_once_are_refused(name):
    words = ("r_max=0.5", "num_tokens=64", "exclude")
    assert_raises(OptionError, lambda: get_method(name, r_max=0.5, num_tokens=64), *words)


@each_method
def test_fewer_tokens_than_tiles_are_refused(name):
    method = get_method(name, num_tokens=4)
    if method.of_image:
        pytest.skip("allots tokens to tiles as it likes, none included")
    context = context_for(method, Draw("few", name), (8, 8), (1, 5))
    assert_raises(
        OptionError, lambda: method.select(context), "num_tokens=4", "5 tiles", "at least 5"
    )


@pytest.mark.parametrize(
    ("option", "valid"),
    [("patch_merge", ("stock", "spatial")), ("newline", ("rows", "all", "none"))],
)
@each_method
def test_how_a_model_runs_is_no_option_of_a_method_and_checked_beside_it(name, option, valid):
    for value in ("wrong", None, 1):
        words = ("Runtime", f"{option}={value!r}", *valid)
        assert_raises(
            OptionError, lambda value=value: PruningConfig.of(name, **{option: value}), *words
        )
    words = (name, f"runtime=Runtime({option}='{valid[0]}')")
    assert_raises(OptionError, lambda: get_method(name, **{option: valid[0]}), *words)


def test_an_unknown_method_is_refused_with_the_known_ones():
    assert_raises(OptionError, lambda: get_method("fastw"), "'fastw'", *list_methods())
    assert_raises(OptionError, lambda: method_class("HIVTP"), "'HIVTP'", "hivtp")


@each_method
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    words = (name, "'ratio'", *(f.name for f in dataclasses.fields(method_class(name))))
    assert_raises(OptionError, lambda: get_method(name, ratio=0.5), *words)


WRONG_OPTIONS = [
    ("hivtp", {"k": 25, "window": 2, "r_max": 0.5}, ("k=25", "r_max", "num_tokens")),
    ("hivtp", {"k": 25, "window": 2, "num_tokens": 64}, ("k=25", "r_max", "num_tokens")),
    ("hivtp", {"k": 25}, ("k=25", "window", "None")),
    ("hivtp", {"k": 0, "window": 2}, ("k=0", "(0, 100]")),
    ("hivtp", {"k": 101, "window": 2}, ("k=101", "(0, 100]")),
    ("hivtp", {"k": "25", "window": 2}, ("k='25'", "(0, 100]")),
    ("hivtp", {"window": None}, ("window=None", "k=")),
    ("hivtp", {"window": 0}, ("window=0", "at least 1")),
    ("hivtp", {"window": 2.0}, ("window=2.0", "integer")),
    ("hivtp", {"window": "x"}, ("window='x'", "integer")),
    ("hivtp", {"window": True}, ("window=True", "integer")),
    ("hivtp", {"regions": 0}, ("regions=0", "at least 1")),
    ("hivtp", {"regions": 1.5}, ("regions=1.5", "integer")),
    ("hivtp", {"layers": ()}, ("layers=()", "tuple")),
    ("hivtp", {"layers": 7}, ("layers=7", "tuple")),
    ("hivtp", {"layers": "7"}, ("layers='7'", "tuple")),
    ("hivtp", {"layers": (7.5,)}, ("layers=(7.5,)", "tuple")),
    ("hivtp", {"layers": (True, 8)}, ("layers=(True, 8)", "tuple")),
    ("hiprune", {"alpha": -0.1}, ("alpha=-0.1", "[0, 1]")),
    ("hiprune", {"alpha": 1.1}, ("alpha=1.1", "[0, 1]")),
    ("hiprune", {"alpha": float("nan")}, ("alpha=nan", "[0, 1]")),
    ("hiprune", {"alpha": None}, ("alpha=None", "[0, 1]")),
    ("hiprune", {"buffer": "ring"}, ("buffer='ring'", *reference.OFFSETS)),
    ("hiprune", {"buffer": None}, ("buffer=None", *reference.OFFSETS)),
    ("hiprune", {"variant": "official"}, ("variant='official'", "paper", "code")),
    ("hiprune", {"object_layer": 0}, ("object_layer=0", "at least 1")),
    ("hiprune", {"object_layer": 9.0}, ("object_layer=9.0", "integer")),
    ("hiprune++", {"beta": -1}, ("beta=-1", "[0, 1]")),
    ("hiprune++", {"beta": 2}, ("beta=2", "[0, 1]")),
    ("hiprune++", {"text": "bert"}, ("text='bert'", "clip", "llm")),
    ("hiprune++", {"extra": "yes"}, ("extra='yes'", "True", "False")),
    ("random", {"seed": -1}, ("seed=-1", "at least 0")),
    ("random", {"seed": 1.0}, ("seed=1.0", "integer")),
    ("random", {"seed": 10**23}, (f"seed={10**23}", f"at most {2**64 - 1}")),
]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    WRONG_OPTIONS,
    ids=[f"{name}-{options}" for name, options, _ in WRONG_OPTIONS],
)
def test_a_wrong_option_is_refused_with_its_value_and_the_valid_ones(name, options, words):
    assert_raises(OptionError, lambda: get_method(name, **options), name, *words)


def test_a_seed_that_python_cannot_write_is_refused_too():
    assert_raises(OptionError, lambda: get_method("random", seed=10**5000), "seed=<int object")


def test_the_largest_seed_draws():
    context = VisionContext(grid=(4, 4))
    assert get_method("random", seed=2**64 - 1).select(context).keep.sum() == 8


def test_r_max_is_rounded_to_whole_patches_and_keeps_one():
    """As its docstring says: 0.3 of 576 is 173, which is 30.03 %."""
    assert "0.3 of 576 is 173 patches" in " ".join(Method.__doc__.split())
    for r_max, kept in ((0.3, 173), (0.0001, 1)):
        method = get_method("uniform", r_max=r_max)
        assert method.select(VisionContext(grid=(24, 24))).keep.sum() == kept


@pytest.mark.parametrize(
    ("buffer", "most"), [("cross", 0.1), ("square", 0.19), ("row", 0.06), ("none", 0.021)]
)
def test_alpha_is_the_share_of_anchors_with_their_buffers_for_the_cross_only(buffer, most):
    """At 192 of 24 x 24 patches, the numbers of its docstring."""
    draw = torch.Generator().manual_seed(0)
    received = {layer: torch.rand(20, 576, generator=draw) for layer in (9, 23)}
    context = VisionContext(grid=(24, 24), received_attention=received, depth=24, feature_layer=23)
    roles = HiPrune(r_max=1 / 3, buffer=buffer).select(context).roles
    assert (roles["anchor"].sum(1) == round(0.1 * 192 / 5)).all()
    share = (roles["anchor"] | roles["buffer"]).sum(1) / 192
    assert share.max() == pytest.approx(most, abs=0.005)
    words = "0.1 of 192 patches is 4 anchors: up to 0.19, 0.06 and 0.02"
    assert words in " ".join(HiPrune.__doc__.split())


@pytest.mark.parametrize("shape", [(576,), (), (2, 576, 3)])
def test_scores_of_other_dimensions_are_asked_for_by_tile(shape):
    """And not as 576 tiles: how many there are cannot be read from such a shape."""
    with pytest.raises(ContextError, match=re.escape(f"shape {shape}: T tiles")) as raised:
        VisionContext(grid=(24, 24), received_attention={9: torch.rand(shape)})
    assert "need (T, 576), one tile (1, 576)" in str(raised.value)


def test_features_of_other_dimensions_are_asked_for_by_tile():
    with pytest.raises(ContextError, match=re.escape("need (T, 16, D), one tile (1, 16, D)")):
        VisionContext(grid=(4, 4), features=torch.rand(16, 8))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (HIVTP(layers=(0,)), ("hivtp: layers", "layer 0", "1 to 23")),
        (HIVTP(layers=(7, -1)), ("hivtp: layers", "layer -1", "1 to 23")),
        (HIVTP(layers=(7, 25)), ("hivtp: layers", "layer 25", "24", "1 to 23")),
        (HIVTP(layers=(24,)), ("hivtp: layers", "layer 24", "past layer 23", "1 to 23")),
        (HiPrune(object_layer=25), ("object_layer", "layer 25", "1 to 23")),
        (HiPrune(object_layer=24), ("object_layer", "layer 24", "past layer 23", "1 to 23")),
        (HiPrunePlus(object_layer=24), ("object_layer", "layer 24", "past layer 23", "1 to 23")),
    ],
)
def test_a_layer_outside_the_encoder_or_past_select_is_refused(method, words):
    scores = {layer: torch.rand(1, 64) for layer in range(-1, 26)}
    context = VisionContext((8, 8), scores, DEPTH, SELECT, relevance=torch.rand(1, 64))
    assert_raises(LayerError, lambda: method.needs(DEPTH, SELECT), *words)
    assert_raises(LayerError, lambda: method.select(context), *words)


@pytest.mark.parametrize("feature_layer", [0, 25, -2])
@pytest.mark.parametrize("method", [HIVTP(), HiPrune(), HiPrunePlus()], ids=lambda m: m.name)
def test_a_select_outside_the_encoder_is_refused(method, feature_layer):
    words = (f"feature_layer={feature_layer}", "24 layers", "1 to 24")
    assert_raises(LayerError, lambda: method.needs(DEPTH, feature_layer), *words)


@pytest.mark.parametrize("method", [HIVTP(), HiPrune(), HiPrunePlus()], ids=lambda m: m.name)
def test_layers_without_the_encoders_depth_are_refused(method):
    for depth, feature_layer in ((None, SELECT), (DEPTH, None)):
        words = (f"depth={depth}", f"feature_layer={feature_layer}")
        assert_raises(ContextError, lambda d=depth, s=feature_layer: method.needs(d, s), *words)


def test_a_window_that_the_budget_cannot_hold_is_refused():
    method = HIVTP(r_max=0.2, window=2)  # 144 windows, 115 patches
    words = ("window=2", "144 windows", "115 patches")
    assert_raises(OptionError, lambda: method.check((24, 24)), *words)
    context = context_for(method, Draw("window"), (24, 24), (1,))
    assert_raises(OptionError, lambda: method.select(context), *words)
    by_tokens = HIVTP(num_tokens=230, window=2)
    by_tokens.check((24, 24))  # one tile can have 230; only the image shows that two cannot
    context = context_for(by_tokens, Draw("window"), (24, 24), (2,))
    assert_raises(OptionError, lambda: by_tokens.select(context), *words)
    assert HIVTP(r_max=0.25, window=2).sizes((24, 24), 144) == (0, 2)  # just fits


@pytest.mark.parametrize(
    ("method", "missing"),
    [(HIVTP(), 8), (HIVTP(layers=(3,)), 3), (HiPrune(), 9), (HiPrune(), SELECT)],
    ids=["hivtp", "hivtp by hand", "hiprune object", "hiprune deep"],
)
def test_a_context_that_lacks_a_layer_is_refused_with_those_it_has(method, missing):
    held = [layer for layer in method.needs(DEPTH, SELECT).received_attention if layer != missing]
    scores = {layer: torch.rand(1, 64) for layer in held}
    context = VisionContext((8, 8), scores, DEPTH, SELECT)
    words = ("received_attention", f"layer {missing};", str(held or "none"))
    assert_raises(ContextError, lambda: method.select(context), *words)


def test_hiprune_plus_without_relevance_is_refused():
    context = context_for(HiPrune(), Draw("relevance"), (8, 8), (1,))
    assert_raises(ContextError, lambda: HiPrunePlus().select(context), "hiprune++", "relevance")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"received_attention": {9: torch.rand(1, 63)}},
            ("received_attention[9]", "(1, 63)", "(1, 64)", "8 x 8"),
        ),
        ({"received_attention": {9: torch.rand(64)}}, ("received_attention[9]", "(64,)", "8 x 8")),
        (
            {"received_attention": {9: torch.rand(1, 1, 64)}},
            ("received_attention[9]", "(1, 1, 64)", "8 x 8"),
        ),
        (
            {"received_attention": {9: torch.rand(2, 64), 23: torch.rand(3, 64)}},
            ("received_attention[23]", "(2, 64)"),
        ),
        (
            {"received_attention": {9: torch.rand(4, 64)}, "tiles": (1, 2)},
            ("received_attention[9]", "(3, 64)"),
        ),
        ({"cls_attention": {2: torch.rand(1, 65)}}, ("cls_attention[2]", "(1, 65)", "(1, 64)")),
        ({"relevance": torch.rand(1, 64, 2)}, ("relevance", "(1, 64, 2)", "(1, 64)")),
        ({"features": torch.rand(1, 64)}, ("features", "(1, 64)", "(1, 64, D)")),
        ({"tiles": (2, 0)}, ("tiles=(2, 0)",)),
        ({"tiles": ()}, ("tiles=()",)),
        ({"grid": (0, 8)}, ("grid=(0, 8)", "at least 1")),
        ({"grid": (8,)}, ("grid=(8,)", "(rows, columns)")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_context_whose_shapes_disagree_is_refused(fields, words):
    assert_raises(ContextError, lambda: VisionContext(**({"grid": (8, 8)} | fields)), *words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("method", [HIVTP(), HiPrune(), HiPrunePlus()], ids=lambda m: m.name)
def test_scores_that_are_not_finite_are_refused_by_the_layers_name(method, bad):
    context = context_for(method, Draw("finite"), (8, 8), (3,))
    layers = method.needs(DEPTH, SELECT).received_attention
    for layer in layers:
        received = {n: scores.clone() for n, scores in context.received_attention.items()}
        received[layer][1, 5] = bad
        broken = dataclasses.replace(context, received_attention=received)
        with pytest.raises(ScoreError) as caught:
            method.select(broken)
        named = [n for n in layers if f"received_attention[{n}]" in str(caught.value)]
        assert named == [layer]
    assert issubclass(ScoreError, LlavaHvpError)


def test_relevance_that_is_not_finite_is_refused():
    method = HiPrunePlus()
    relevance = torch.full((1, 64), float("nan"))
    context = context_for(method, Draw("finite"), (8, 8), (1,), relevance=relevance)
    assert_raises(ScoreError, lambda: method.select(context), "relevance")


def test_all_scores_that_are_not_finite_are_named_at_once():
    received = {7: torch.full((1, 64), float("inf")), 8: torch.rand(1, 64)}
    received |= {9: torch.full((1, 64), float("nan")), 10: torch.rand(1, 64)}
    context = VisionContext((8, 8), received, DEPTH, SELECT)
    assert_raises(
        ScoreError,
        lambda: HIVTP().select(context),
        "received_attention[7], received_attention[9]",
        "float32",
    )


# The registry


@pytest.fixture
def first_method():
    """A method defined outside of the package; gone again when the test ends."""

    def define():
        @dataclass(frozen=True, kw_only=True)
        class First(VisionMethod):
            name: ClassVar[str] = "first-of-a-test"
            summary: ClassVar[str] = "the first patches"
            roles: ClassVar[tuple[str, ...]] = ("first",)

            skip: int = 0

            def choose(self, context, budget):
                place = torch.arange(context.patches).expand(context.total_tiles, -1)
                return Selection.from_roles(
                    {"first": (place >= self.skip) & (place < self.skip + budget)}
                )

        return First

    yield define
    gc.collect()  # subclasses are held weakly, but a class is part of a cycle
    assert "first-of-a-test" not in list_methods()


def test_a_new_subclass_is_found_by_its_name_and_takes_part_in_budgets(first_method):
    kind = first_method()
    assert "first-of-a-test" in list_methods()
    assert method_class("first-of-a-test") is kind
    method = get_method("first-of-a-test", num_tokens=8, skip=2)
    keep = method.select(VisionContext((4, 4), tiles=(1, 2))).keep
    assert patches_of(keep) == [set(range(2, 10)), {2, 3, 4, 5}, {2, 3, 4, 5}]
    assert_raises(
        OptionError, lambda: get_method("first-of-a-test", skipp=2), "'skipp'", "skip", "r_max"
    )
    assert_raises(OptionError, lambda: get_method("first-of-a-test", r_max=2), "r_max=2", "(0, 1]")


def test_the_names_of_the_methods_are_sorted_and_each_has_its_texts():
    names = list_methods()
    assert names == sorted(names)
    assert {"hivtp", "hiprune", "hiprune++", "random", "uniform"} <= set(names)
    for name in names:
        kind = method_class(name)
        assert kind.name == name
        assert kind.summary
        assert kind.roles


@each_method
def test_choosing_never_waits_for_the_device(name):
    # A meta tensor has no values: whatever would fetch one, or a count of them, raises.
    method = get_method(name, num_tokens=40)
    context = context_for(method, Draw("meta", name), (6, 10), (1, 5, 1))

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, dict):
            return {key: moved(v) for key, v in value.items()}
        if isinstance(value, tuple):
            return tuple(moved(v) for v in value)
        return value

    fields = {f.name: moved(getattr(context, f.name)) for f in dataclasses.fields(context)}
    on_meta = VisionContext(**fields)
    selection = method.select_unchecked(on_meta)
    assert selection.keep.shape == (7, 60)
    if on_meta.device.type == "meta":
        assert selection.keep.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ones(1, device="meta").item()
