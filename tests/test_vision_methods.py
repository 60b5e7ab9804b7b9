"""Six methods that choose by CLS, by diversity or by coverage: as the slow rules, on any grid."""

import dataclasses

import numpy as np
import pytest
import reference_vision as slow
import torch

from llava_hvp import (
    SCOPE,
    CDPruner,
    DivPrune,
    FasterVLM,
    HiPrunePlus,
    MMTok,
    VisionContext,
    VisPruner,
    get_method,
)
from llava_hvp.errors import ContextError, LayerError, OptionError, ScoreError
from llava_hvp.methods.mmtok import STOP_WORDS, content_words

DEPTH, SELECT, ROUNDING = 24, 23, 1e-5
NAMES = ["cdpruner", "divprune", "fastervlm", "mmtok", "scope", "vispruner"]
TINY = [(1, 2), (2, 3), (3, 3), (4, 4), (5, 3), (4, 6)]
GRIDS = [(7, 7), (12, 12), (16, 16), (27, 27), (9, 4), (5, 11)]
CASES = 200

each_name = pytest.mark.parametrize("name", NAMES)
each_kind = pytest.mark.parametrize("kind", ["apart", "clusters", "exact"])


def tokens(g, kind, tiles, patches, dim):
    """(tiles, patches, dim): apart, in clusters, or plus and minus basis vectors full of ties."""
    apart = g.standard_normal((tiles, patches, dim), dtype=np.float32)
    label = g.integers(0, max(2, patches // 3), (tiles, patches))
    if kind == "apart":
        return torch.from_numpy(apart)
    if kind == "clusters":
        centers = g.standard_normal((tiles, patches, dim), dtype=np.float32)
        near = centers[np.arange(tiles)[:, None], label % patches]
        return torch.from_numpy(near + np.float32(0.2) * apart)
    sign = g.integers(-1, 2, (tiles, patches, 1)).astype(np.float32)
    return torch.from_numpy(sign * np.eye(dim, dtype=np.float32)[label % dim])


def scores(g, kind, tiles, patches):
    if kind == "exact":
        return torch.from_numpy(g.integers(0, 4, (tiles, patches)).astype(np.float32) / 8)
    return torch.from_numpy(g.random((tiles, patches), dtype=np.float32))


def context_of(seed, grid, images, kind="apart", dim=12):
    """All that the six methods read, of images with these tile counts."""
    g, tiles, patches = np.random.default_rng(seed), sum(images), grid[0] * grid[1]
    words = tuple(
        torch.from_numpy(g.standard_normal((int(g.integers(1, 6)), dim), dtype=np.float32))
        for _ in images
    )
    return VisionContext(
        grid,
        depth=DEPTH,
        feature_layer=SELECT,
        tiles=tuple(images),
        cls_attention={SELECT: scores(g, kind, tiles, patches)},
        features=tokens(g, kind, tiles, patches, dim),
        projected=tokens(g, kind, tiles, patches, dim),
        relevance=scores(g, kind, tiles, patches),
        words=words,
        padding=torch.from_numpy(g.random((tiles, patches)) < 0.3),
    )


def kept(keep):
    return [row.nonzero().flatten().tolist() for row in keep]


def slow_fastervlm(method, context, share):
    return [(slow.cls_best(row, share), 0.0) for row in context.cls_attention[SELECT].tolist()]


def slow_vispruner(method, context, share):
    tiles = zip(context.cls_attention[SELECT].tolist(), context.features.numpy(), strict=True)
    found = [slow.vispruner(row, rows, share, method.important_ratio) for row, rows in tiles]
    return [(important + diverse, margin) for important, diverse, margin in found]


def slow_divprune(method, context, share):
    if method.scope == "tile":
        return [slow.max_min(rows, share) for rows in context.projected.numpy()]
    found, start = [], 0
    for tiles in context.images:
        rows = context.projected[start : start + tiles].flatten(0, 1).numpy()
        start += tiles
        order, margin = slow.max_min(rows, min(share * tiles, len(rows)))
        of_tile = [divmod(place, context.patches) for place in order]
        found += [([p for t, p in of_tile if t == tile], margin) for tile in range(tiles)]
    return found


def slow_cdpruner(method, context, share):
    found, start = [], 0
    for tiles in context.images:
        own = slice(start, start + tiles)
        start += tiles
        relevance = context.relevance[own].tolist()
        negated = method.sign == "negated"
        found += slow.cdpruner(context.projected[own].numpy(), relevance, share, negated)
    return found


def slow_scope(method, context, share):
    tiles = zip(context.cls_attention[SELECT].tolist(), context.features.numpy(), strict=True)
    return [slow.scope(row, rows, share, method.alpha) for row, rows in tiles]


def slow_mmtok(method, context, share):
    owner = [image for image, tiles in enumerate(context.images) for _ in range(tiles)]
    return [
        slow.mmtok(
            context.words[image].numpy(),
            context.projected[tile].numpy(),
            context.features[tile].numpy(),
            share,
            set(kept(context.padding)[tile]),
            method.alpha,
            method.t_text,
            method.t_vision,
        )
        for tile, image in enumerate(owner)
    ]


SLOW = {
    "cdpruner": slow_cdpruner,
    "divprune": slow_divprune,
    "fastervlm": slow_fastervlm,
    "mmtok": slow_mmtok,
    "scope": slow_scope,
    "vispruner": slow_vispruner,
}


def options_of(g, name):
    drawn = {
        "vispruner": {"important_ratio": float(g.choice([0, 0.25, 0.5, 0.75, 1, g.random()]))},
        "divprune": {"scope": str(g.choice(["tile", "image"]))},
        "cdpruner": {"sign": str(g.choice(["direct", "negated"]))},
        "scope": {"alpha": float(g.choice([0, 0.5, 1, 2]))},
        "mmtok": {
            "alpha": float(g.choice([0.1, 0.5, 1])),
            "t_text": float(g.choice([0.02, 0.1])),
            "t_vision": float(g.choice([0.2, 1])),
        },
    }
    return drawn.get(name, {})


def compare(method, context, share, expected, kind):
    """How many tiles kept what the slow rule keeps, and how many are open to rounding."""
    compared, unsure = 0, 0
    keep = method.select(context).keep
    total = sum(len(order) for order, _ in expected)
    assert keep.sum() == total == min(share, context.patches) * context.total_tiles
    for found, (order, margin) in zip(kept(keep), expected, strict=True):
        # Two patches that cover each other tie in any precision, and sums of cosines are rounded.
        tie = 0 if method.name in ("divprune", "fastervlm", "cdpruner") else -1
        if tie < margin < ROUNDING and (kind != "exact" or method.name == "mmtok"):
            unsure += 1
            continue
        compared += 1
        assert found == sorted(order), method
    return compared, unsure


@each_kind
@each_name
def test_a_method_keeps_what_the_slow_rule_keeps(name, kind):
    compared, unsure = 0, 0
    for seed in range(CASES):
        g = np.random.default_rng([seed, 7])
        grid, tiles = TINY[g.integers(len(TINY))], int(g.integers(1, 4))
        share = int(g.integers(1, grid[0] * grid[1]))
        context = context_of(seed, grid, (tiles,) * int(g.integers(1, 3)), kind)
        method = get_method(name, num_tokens=share * tiles, **options_of(g, name))
        found = compare(method, context, share, SLOW[name](method, context, share), kind)
        compared, unsure = compared + found[0], unsure + found[1]
    assert compared > 150
    assert name == "mmtok" or compared > 3 * unsure


@pytest.mark.parametrize("grid", GRIDS, ids="{0[0]}x{0[1]}".format)
@each_name
def test_a_method_keeps_what_the_slow_rule_keeps_on_larger_grids(name, grid):
    compared = 0
    for seed in range(3):
        g, share = np.random.default_rng([seed, 8]), 5 + 3 * seed
        context = context_of(seed, grid, (2,), "apart", dim=32)
        method = get_method(name, num_tokens=2 * share, **options_of(g, name))
        if name == "vispruner":
            share = grid[0] * grid[1] // 2 + seed  # of few, thousands of near ties decide
            method = dataclasses.replace(method, num_tokens=2 * share)
        expected = SLOW[name](method, context, share)
        compared += compare(method, context, share, expected, "apart")[0]
    assert compared


@each_kind
@each_name
def test_images_that_share_num_tokens_differently_are_chosen_from_as_alone(name, kind):
    for seed in range(12):
        g, images = np.random.default_rng([seed, 9]), (1, 5, 3, 1, 5)
        context = context_of(seed, (4, 5), images, kind)
        method = get_method(name, num_tokens=int(g.integers(5, 60)), **options_of(g, name))
        batch, start = method.select(context).keep, 0
        for tiles in images:
            own = torch.arange(start, start + tiles)
            start += tiles
            alone = method.select(context.rows(own, (tiles,))).keep
            assert torch.equal(alone, batch[own]), (seed, tiles)


def repeated(rows, distinct):
    """Of each tile only the first `distinct` rows, again and again."""
    return rows[:, torch.arange(rows.shape[1]) % distinct]


@each_name
def test_exactly_the_budget_is_kept_where_features_repeat(name):
    context = context_of(0, (24, 24), (1, 1), dim=64)
    context = dataclasses.replace(
        context,
        features=repeated(context.features, 41),
        projected=repeated(context.projected, 41),
        padding=torch.arange(576).expand(2, -1) >= 41,
    )
    for budget in (41, 42, 64, 192):
        keep = get_method(name, num_tokens=budget).select(context).keep
        assert keep.sum(-1).tolist() == [budget, budget]


@each_name
def test_exactly_the_budget_is_kept_of_features_of_low_rank_and_of_none(name):
    for dim, scale in ((2, 1), (32, 1), (4, 0)):
        context = context_of(1, (12, 12), (1, 2), dim=dim)
        context = dataclasses.replace(
            context, features=context.features * scale, projected=context.projected * scale
        )
        for budget in (36, 64, 143):
            keep = get_method(name, r_max=budget / 144).select(context).keep
            assert keep.sum(-1).tolist() == [budget] * 3


def test_cdpruner_takes_all_that_differ_before_any_double():
    context = context_of(2, (24, 24), (1,), dim=64)
    context = dataclasses.replace(context, projected=repeated(context.projected, 41))
    for count in (41, 64):
        places = CDPruner(num_tokens=count).select(context).keep.nonzero()[:, 1]
        assert len((places % 41).unique()) == 41


def test_cdpruner_fills_up_with_the_most_relevant_by_its_sign():
    # One direction only: after the first patch all are doubles.
    for sign, order in (("direct", [3, 2, 1]), ("negated", [0, 1, 2])):
        context = VisionContext(
            (1, 4), relevance=torch.tensor([[0.1, 0.2, 0.3, 0.4]]), projected=torch.ones(1, 4, 2)
        )
        keep = CDPruner(num_tokens=3, sign=sign).select(context).keep
        assert kept(keep) == [sorted(order)]


def test_cdpruner_scales_relevance_over_the_tiles_of_one_image():
    g = np.random.default_rng(3)
    projected = tokens(g, "apart", 2, 64, 8)
    relevance = scores(g, "apart", 2, 64) * torch.tensor([[1.0], [0.01]])
    together = VisionContext((8, 8), relevance=relevance, projected=projected, tiles=(2,))
    apart = dataclasses.replace(together, tiles=(1, 1))
    method = CDPruner(num_tokens=24)
    of_two, of_each = method.select(together).keep, CDPruner(num_tokens=12).select(apart).keep
    assert not torch.equal(of_two[1], of_each[1])  # the second tile's relevance is nearly one there


def test_equal_relevance_leaves_diversity_alone():
    context = context_of(4, (8, 8), (1,))
    equal = dataclasses.replace(context, relevance=torch.full((1, 64), 0.3))
    expected, margin = slow.determinantal(
        slow.cosines(context.projected[0].numpy()), [1.0] * 64, 10
    )
    assert margin == 0  # of the first only: all are alike then
    assert kept(CDPruner(num_tokens=10).select(equal).keep) == [sorted(expected)]


def test_divprune_shares_the_budget_of_an_image_among_its_tiles_by_diversity():
    context = context_of(5, (6, 6), (3, 1, 3), dim=8)
    # The second tile shows one thing.
    projected = context.projected.clone()
    projected[1] = projected[1, :1]
    context = dataclasses.replace(context, projected=projected)
    of_image = DivPrune(num_tokens=30, scope="image").select(context).keep.sum(-1).tolist()
    of_tile = DivPrune(num_tokens=30).select(context).keep.sum(-1).tolist()
    assert of_tile == [10, 10, 10, 30, 10, 10, 10]
    assert [sum(of_image[:3]), of_image[3], sum(of_image[4:])] == [30, 30, 30]
    assert of_image[1] <= 1


def test_divprunes_budget_of_an_image_is_that_of_its_tiles_together():
    for options in ({"r_max": 0.1}, {"num_tokens": 640}):
        tile, image = DivPrune(**options), DivPrune(scope="image", **options)
        assert (tile.of_image, image.of_image) == (False, True)
        for tiles in (1, 3, 5):
            assert image.budget(576, tiles) == tiles * tile.budget(576, tiles)


def test_mmtok_leaves_padding_out_while_there_are_others():
    context = context_of(6, (6, 6), (2,))
    padding = torch.zeros(2, 36, dtype=torch.bool)
    padding[:, :12] = True
    padded = dataclasses.replace(context, padding=padding)
    assert not (MMTok(num_tokens=40).select(padded).keep & padding).any()
    keep = MMTok(num_tokens=60).select(padded).keep
    assert (keep | padding).all()
    assert keep.sum(-1).tolist() == [30, 30]
    none = dataclasses.replace(context, padding=None)
    nothing = dataclasses.replace(context, padding=torch.zeros_like(padding))
    method = MMTok(num_tokens=20)
    assert torch.equal(method.select(none).keep, method.select(nothing).keep)


def test_mmtok_covers_the_words_of_each_image_with_that_images_tiles():
    # A patch a word, all patches alike otherwise: the words alone decide.
    patches = torch.eye(6)[None].repeat(3, 1, 1)
    words = (torch.eye(6)[[4]], torch.eye(6)[[1, 2]])
    context = VisionContext(
        (2, 3), features=torch.ones(3, 6, 4), projected=patches, words=words, tiles=(2, 1)
    )
    keep = MMTok(r_max=1 / 6, alpha=0).select(context).keep
    assert kept(keep) == [[4], [4], [1]]
    assert kept(MMTok(r_max=2 / 6, alpha=0).select(context).keep)[2] == [1, 2]


def test_hiprune_plus_takes_the_smallest_cosine_when_its_sign_is_negated():
    g = np.random.default_rng(8)
    received = {9: scores(g, "apart", 1, 36), SELECT: scores(g, "apart", 1, 36)}
    relevance = scores(g, "exact", 1, 36)
    context = VisionContext((6, 6), received, DEPTH, SELECT, relevance=relevance)
    turned = dataclasses.replace(context, relevance=-relevance)
    negated = HiPrunePlus(r_max=0.5, beta=0.5, sign="negated")
    direct = HiPrunePlus(r_max=0.5, beta=0.5)
    assert direct.sign == "direct"
    assert torch.equal(negated.select(context).keep, direct.select(turned).keep)
    assert not torch.equal(negated.select(context).keep, direct.select(context).keep)


@each_name
def test_a_choice_waits_for_no_device(name):
    # Meta tensors have no values: whatever would fetch one raises.
    context, images = context_of(0, (6, 6), (2, 1, 2)), (2, 1, 2)
    on_meta = dataclasses.replace(
        context,
        cls_attention={SELECT: context.cls_attention[SELECT].to("meta")},
        **{n: getattr(context, n).to("meta") for n in ("features", "projected", "relevance")},
        words=tuple(words.to("meta") for words in context.words),
        padding=context.padding.to("meta"),
    )
    keep = get_method(name, r_max=0.3).select_unchecked(on_meta).keep
    assert (keep.device.type, tuple(keep.shape)) == ("meta", (sum(images), 36))


def test_words_of_a_prompt_are_those_that_say_something():
    assert content_words("What color is the cat, or the DOG?") == "color cat DOG"
    for instruction in (
        "Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
    ):
        assert content_words(f"Is it raining?\n{instruction}") == "raining"
    assert content_words("Who is he?") == "Who is he?"
    assert content_words("What's on the left?") == "s on left"
    assert content_words("这是什么") == "这是什么"
    assert len(STOP_WORDS) == 47


# Wrong input


def without(name, context):
    return dataclasses.replace(context, **{name: {} if name == "cls_attention" else None})


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *(
            ("fastervlm", "cls_attention"),
            ("vispruner", "cls_attention"),
            ("vispruner", "features"),
        ),
        *(("divprune", "projected"), ("cdpruner", "projected"), ("cdpruner", "relevance")),
        *(("scope", "cls_attention"), ("scope", "features")),
        *(("mmtok", "features"), ("mmtok", "projected"), ("mmtok", "words")),
    ],
)
def test_a_context_that_lacks_what_a_method_reads_is_refused(name, missing):
    context = without(missing, context_of(0, (4, 4), (1,)))
    with pytest.raises(ContextError) as caught:
        get_method(name).select(context)
    assert name in str(caught.value)
    assert missing in str(caught.value)


def test_an_image_without_words_is_refused():
    context = context_of(0, (4, 4), (1, 1))
    context = dataclasses.replace(context, words=(context.words[0], torch.zeros(0, 12)))
    with pytest.raises(ContextError, match=r"mmtok needs .* 0\]"):
        MMTok().select(context)


@each_name
def test_what_is_not_finite_is_refused_by_its_name(name):
    needs = get_method(name).needs(DEPTH, SELECT)
    fields = {"features": needs.features, "projected": needs.projected}
    read = [field for field, wanted in fields.items() if wanted] or ["cls_attention"]
    for field in read:
        context = context_of(0, (4, 4), (2,))
        tensor = (
            context.cls_attention[SELECT] if field == "cls_attention" else getattr(context, field)
        )
        tensor[1, 5] = float("nan")
        with pytest.raises(ScoreError, match=field):
            get_method(name).select(context)
        # Before anyone has looked, a mask is still a mask.
        assert get_method(name).select_unchecked(context).keep.shape == (2, 16)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vispruner", {"important_ratio": 1.1}, ("important_ratio=1.1", "[0, 1]")),
        ("vispruner", {"important_ratio": "x"}, ("important_ratio='x'", "[0, 1]")),
        ("divprune", {"scope": "batch"}, ("scope='batch'", "tile", "image")),
        ("cdpruner", {"sign": "-"}, ("sign='-'", "direct", "negated")),
        ("scope", {"alpha": -1}, ("alpha=-1", "[0,")),
        ("mmtok", {"alpha": -0.1}, ("alpha=-0.1", "[0,")),
        ("mmtok", {"t_text": 0}, ("t_text=0", "(0,")),
        ("mmtok", {"t_vision": None}, ("t_vision=None", "(0,")),
        ("hiprune++", {"sign": "plus"}, ("sign='plus'", "direct", "negated")),
        ("hiprune++", {"sign": "negated", "text": "llm"}, ("sign='negated'", "text='llm'", "clip")),
    ],
)
def test_a_wrong_option_is_refused(name, options, words):
    with pytest.raises(OptionError) as caught:
        get_method(name, **options)
    for word in (name, *words):
        assert word in str(caught.value)


def test_methods_that_ask_cls_say_so_and_read_the_layer_that_is_handed_on():
    for method in (FasterVLM(), VisPruner(), SCOPE()):
        assert method.needs_cls
        assert method.needs(DEPTH, SELECT).cls_attention == (SELECT,)
        assert method.needs(DEPTH, DEPTH).cls_attention == (DEPTH,)
        with pytest.raises(LayerError, match="feature_layer=25"):
            method.needs(DEPTH, 25)
    for method in (DivPrune(), CDPruner(), MMTok()):
        assert not method.needs_cls


@pytest.mark.parametrize(
    ("ratio", "tokens", "important"), [(0.5, 64, 32), (0.5, 29, 14), (0.75, 58, 43), (0, 9, 0)]
)
def test_vispruner_gives_attention_the_whole_part_of_its_share(ratio, tokens, important):
    context = context_of(9, (12, 12), (1,))
    roles = VisPruner(num_tokens=tokens, important_ratio=ratio).select(context).roles
    assert roles["important"].sum() == important
    assert roles["diverse"].sum() == tokens - important
