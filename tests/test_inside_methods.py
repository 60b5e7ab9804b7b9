"""FastV, PyramidDrop and SparseVLM by themselves: layers, budgets, rules, wrong options."""

import itertools

import pytest
import torch
from reference_inside import corrected, merged, raters

from llava_hvp import FastV, PyramidDrop, SparseVLM, get_method
from llava_hvp.errors import LayerError, OptionError
from llava_hvp.methods.language import LanguageContext, LanguageMethod, Stage
from llava_hvp.methods.sparsevlm import merged_by_density

KINDS = [FastV, PyramidDrop, SparseVLM]
DEPTHS = [8, 12, 24, 32, 40]


def layers_of(method, depth):
    return tuple(stage.layer for stage in method.stages(depth))


# What enters a layer on average -> what stays, of 576 tokens in 32 layers.
FASTV = {
    2: {192: 166, 128: 98, 64: 29},
    3: {192: 152, 128: 81, 64: 11},
    1: {192: 179, 128: 113, 64: 47},
}


@pytest.mark.parametrize(("layer", "tokens"), itertools.product(FASTV, (192, 128, 64)))
def test_fastv_keeps_what_the_average_leaves(layer, tokens):
    kept = FASTV[layer][tokens]
    assert FastV(layer=layer, num_tokens=tokens).keeps(576, 32) == (kept,)
    assert FastV(layer=layer, r_max=tokens / 576).keeps(576, 32) == (kept,)
    assert (
        layer * 576 + (32 - layer) * kept <= 32 * tokens < layer * 576 + (32 - layer) * (kept + 1)
    )


@pytest.mark.parametrize(
    ("tokens", "kept", "average"),
    [(192, (322, 180, 101), 191.875), (128, (242, 102, 42), 127.875), (64, (110, 21, 4), 63.875)],
)
def test_pyramiddrop_takes_the_largest_powers_within_a_budget(tokens, kept, average):
    method = PyramidDrop(num_tokens=tokens)
    assert layers_of(method, 32) == (2, 8, 16)
    assert method.keeps(576, 32) == kept
    assert method.average(576, 32) == average


def test_pyramiddrop_without_a_budget_is_the_papers():
    method = PyramidDrop()
    assert layers_of(method, 32) == (8, 16, 24)
    assert method.keeps(576, 32) == (288, 144, 72)
    assert method.average(576, 32) == 270
    assert PyramidDrop(ratios=(0.7, 0.49, 0.343)).keeps(577, 32) == (403, 282, 197)
    assert PyramidDrop(layers=(2, 9)).keeps(64, 12) == (32, 16)


@pytest.mark.parametrize(
    ("version", "tokens", "kept", "average"),
    [
        ("1.5", 192, (300, 200, 110), 206.5),
        ("1.5", 128, (303, 110, 36), 145.4),
        ("1.5", 96, (238, 48, 26), 114.1),
        ("1.5", 64, (66, 30, 17), 82.3),
        ("2.0", 192, (300, 200, 118), 206.8),
        ("2.0", 64, (66, 34, 20), 81.8),
    ],
)
def test_sparsevlms_published_lists_are_more_than_their_names(version, tokens, kept, average):
    method = SparseVLM(version=version, tokens=kept)
    assert method.keeps(576, 32) == kept
    assert method.average(576, 32) == pytest.approx(average, abs=0.06)
    # Here the name is a bound, as with every other method, and it is used.
    by_number = SparseVLM(version=version, num_tokens=tokens)
    assert tokens - 3 < by_number.average(576, 32) <= tokens
    assert 2 * tokens - 6 < by_number.average(1152, 32, 2) <= 2 * tokens


def test_what_is_merged_counts():
    method = SparseVLM(tokens=(66, 30, 17))
    assert [method.merges(dropped) for dropped in (0, 1, 52, 510)] == [0, 1, 2, 16]
    assert method.counts(576, 32) == (82, 32, 18)
    assert SparseVLM(version="2.0", tokens=(66, 34, 20)).counts(576, 32) == (66, 34, 20)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_met_and_used(kind, depth):
    for visual, r_max in itertools.product((64, 576, 2880), (0.45, 0.6, 0.9)):
        method = kind(r_max=r_max)
        method.check(depth)
        found = method.average(visual, depth)
        assert found <= r_max * visual
        # A token more at every stage, or what a power of lambda adds, is all that is missing.
        assert found >= r_max * visual - 0.05 * visual
        by_number = kind(num_tokens=round(r_max * visual) - 1)
        assert by_number.average(visual, depth) <= r_max * visual
        assert by_number.average(2 * visual, depth, 2) <= 2 * r_max * visual


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_all_keeps_all(kind):
    for given in ({"r_max": 1}, {"num_tokens": 64}, {"num_tokens": 65}):
        assert set(kind(**given).counts(64, 32)) == {64}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_scale_with_depth_and_rise(kind):
    method = kind(r_max=0.5)
    assert layers_of(method, 64) == tuple(2 * layer for layer in layers_of(method, 32))
    for depth in range(len(layers_of(method, 32)) + 1, 80):
        layers = layers_of(method, depth)
        assert all(1 <= a < b < depth for a, b in itertools.pairwise((*layers, depth - 0.5)))
    with pytest.raises(LayerError, match="no room"):
        method.stages(len(layers_of(method, 32)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_few_tokens_keeps_one_at_least(kind):
    for visual in (1, 2, 5):
        assert min(kind(r_max=0.2).counts(visual, 32)) >= 1


WRONG = [
    (FastV, {"ratio": 0}, "ratio=0"),
    (FastV, {"ratio": 0.5, "r_max": 0.5}, "excludes r_max"),
    (FastV, {"layer": 0}, "layer=0"),
    (PyramidDrop, {"ratios": (0.5, 0.25)}, "3 drops"),
    (PyramidDrop, {"ratios": (0.5, 0.6, 0.1)}, "falling"),
    (PyramidDrop, {"ratios": (0.5, 0.25, 0.1), "num_tokens": 64}, "excludes"),
    (PyramidDrop, {"layers": ()}, "tuple of integers"),
    (PyramidDrop, {"layers": (0, 2)}, "tuple of integers"),
    (SparseVLM, {"version": "1.0"}, "1.5, 2.0"),
    (SparseVLM, {"tokens": (3, 2)}, "for each of layers"),
    (SparseVLM, {"layers": (3, 7)}, "for each of layers"),
    (SparseVLM, {"tokens": (3, 2, 1), "r_max": 0.5}, "excludes"),
]


@pytest.mark.parametrize(("kind", "options", "words"), WRONG, ids=str)
def test_wrong_options_say_what_is_wrong(kind, options, words):
    with pytest.raises(OptionError, match=words):
        kind(**options)


FLOORS = [
    (FastV, {"r_max": 0.0625}, "0.062 of them"),
    (PyramidDrop, {"r_max": 0.05}, "2 layers before the drop"),
    (SparseVLM, {"r_max": 0.09}, "3 layers before the drop"),
    (SparseVLM, {"r_max": 0.095}, "one token at each drop, and what is merged"),
]


@pytest.mark.parametrize(("kind", "options", "words"), FLOORS, ids=str)
def test_a_budget_below_the_first_layers_says_so(kind, options, words):
    with pytest.raises(OptionError, match=words):
        kind(**options).check(32)
    with pytest.raises(OptionError, match=words):
        kind(**options).keeps(576, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_below_the_first_layers_says_the_least(kind):
    with pytest.raises(OptionError, match=r"num_tokens=20 of 576 visual tokens .* give") as raised:
        kind(num_tokens=20).keeps(576, 32)
    least = int(str(raised.value).split("give ")[1].split()[0])
    with pytest.raises(OptionError):
        kind(num_tokens=least - 1).keeps(576, 32)


@pytest.mark.parametrize("layers", [(3, 3, 4), (4, 3, 5), (1, 2, 32)])
def test_layers_rise_and_lie_inside(layers):
    for kind in (PyramidDrop, SparseVLM):
        with pytest.raises(LayerError):
            kind(layers=layers).stages(32)


def test_they_are_found_by_name():
    for name, kind in (("fastv", FastV), ("pyramiddrop", PyramidDrop), ("sparsevlm", SparseVLM)):
        assert get_method(name, r_max=0.4) == kind(r_max=0.4)
        assert issubclass(kind, LanguageMethod)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_raters_of_ragged_rows_are_those_of_each_alone():
    lengths, images, n = (12, 9), ((2, 6), (5, 7)), 12
    embeds = drawn(2, n, 8)
    visual, text = (torch.zeros(2, n, dtype=torch.bool) for _ in range(2))
    for row, (length, (start, end)) in enumerate(zip(lengths, images, strict=True)):
        visual[row, n - length + start : n - length + end] = True
        text[row, n - length + end :] = True
    found = SparseVLM().raters(embeds, visual, text)
    for row, length in enumerate(lengths):
        skipped = n - length
        wanted = raters(embeds[row, skipped:].double(), visual[row, skipped:].tolist())
        assert {c - skipped for c in found[row].nonzero().flatten().tolist()} == wanted


def test_a_single_word_rates():
    visual, text = torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    assert SparseVLM().raters(drawn(1, 3, 4), visual, text).tolist() == text.tolist()


@pytest.mark.parametrize("count", [1, 2, 9, 40, 101])
def test_merged_tokens_are_those_of_a_slow_clustering(count):
    states = drawn(count, 6, seed=count)
    method = SparseVLM()
    found, columns = method.merge(states, torch.arange(count) + 7)
    wanted = torch.stack(merged(states.double(), None))
    assert len(found) == method.merges(count)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert len(set(columns.tolist())) == len(columns)


def test_of_two_equal_densities_the_lower_index_is_the_denser():
    x = torch.tensor([[0.0, 0], [1, 0], [10, 0], [11, 0]])  # two pairs of mutual neighbours
    _, centres = merged_by_density(x, 2)
    assert centres.tolist() == [0, 2]
    _, centres = merged_by_density(x.flip(0), 2)
    assert centres.tolist() == [0, 2]


def test_the_fourteen_heads_that_look_most_at_the_image_score():
    attention = drawn(1, 20, 3, 10).softmax(-1)
    alone = 1 + drawn(1, 1, 3, 10, seed=1).abs()
    visual = torch.zeros(1, 10, dtype=torch.bool)
    visual[:, 2:7] = True
    rows = torch.tensor([[True, False, True]])
    context = LanguageContext(attention, rows, visual, torch.ones_like(visual), alone, 0)
    found = SparseVLM(version="2.0").scores(context)
    chosen = [0, 2]
    wanted = corrected(attention[0, :, chosen], alone[0, 0, chosen], list(range(2, 7)))
    torch.testing.assert_close(found[0, 2:7], wanted[2:7])


def test_a_method_is_its_stages_and_its_counts():
    class Halves(LanguageMethod):
        name = "halves"
        summary = "half after every layer"
        listed = False

        def stages(self, depth):
            return tuple(Stage(layer) for layer in range(1, depth))

        def keeps(self, visual, depth, images=1):
            return tuple(max(1, visual >> layer) for layer in range(1, depth))

    method = Halves(r_max=0.9)
    assert method.counts(64, 4) == (32, 16, 8)
    assert method.average(64, 4) == 30
