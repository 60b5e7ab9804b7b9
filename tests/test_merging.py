"""VisionZip, PruMerge(+), HiRED and FoPru keep and merge what their slow rules do."""

import random
from fractions import Fraction

import pytest
import reference
import reference_merging as slow
import torch

from llava_hvp import FoPru, HiRED, PruMerge, PruMergePlus, VisionContext, VisionZip, get_method
from llava_hvp.errors import ContextError, OptionError, ScoreError, UnsupportedModelError

DEPTH, SELECT, HEADS = 24, 23, 2
TINY = [(2, 2), (3, 3), (4, 4), (5, 3), (2, 7), (6, 4)]
GRIDS = [(7, 7), (12, 12), (16, 16), (27, 27), (6, 10), (9, 4), (5, 8)]
IMAGES = [(1,), (2,), (1, 1), (5,), (3, 1), (1, 5, 3, 5)]
MOSAICS = {1: [None], 2: [(1, 1)], 3: [(1, 2), (2, 1)], 5: [(2, 2), (4, 1), (1, 4)]}
KINDS = ["continuous", "ties"]
MANY, FEW = 600, 8  # cases of tiny grids, and of each larger one


class Case:
    """Options, grids and tensors of one case, all from its seed."""

    def __init__(self, *seed, grid=None, kind="continuous"):
        self.random = random.Random(repr(seed))
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))
        self.grid, self.kind = grid or self.random.choice(TINY), kind
        self.images = self.random.choice(IMAGES)
        self.patches, self.tiles = self.grid[0] * self.grid[1], sum(self.images)

    def scores(self):
        shape = self.tiles, self.patches
        if self.kind == "ties":
            return torch.randint(self.random.randint(1, 4), shape, generator=self.generator) / 8
        return torch.rand(shape, generator=self.generator)

    def states(self, width):
        """(T, S, width) keys, queries or states; with ties, few directions and exact cosines."""
        shape = self.tiles, 1 + self.patches, width
        if self.kind == "ties":
            which = torch.randint(
                self.random.randint(1, width), shape[:2], generator=self.generator
            )
            return 2.0 * torch.nn.functional.one_hot(which, width)
        return torch.randn(shape, generator=self.generator)

    def context(self, **fields):
        return VisionContext(
            self.grid, depth=DEPTH, feature_layer=SELECT, heads=HEADS, tiles=self.images, **fields
        )

    def options(self, least=1):
        """A budget as an option, and that of each tile by the rules."""
        if self.random.random() < 0.5:
            most = max(least, self.patches - 1)
            budget = self.random.choice([least, self.random.randint(least, most)])
            budgets = [min(budget, self.patches)] * self.tiles
            return {"r_max": min(1, budget / self.patches)}, budgets
        tokens = self.random.randint(least * max(self.images), self.patches * max(self.images))
        shares = reference.shares(tokens, self.images)
        return {"num_tokens": tokens}, [min(share, self.patches) for share in shares]


def each_case(test):
    """Many cases on tiny grids, and some on each larger one."""
    seeds = [(None, kind) for kind in KINDS] + [(grid, kind) for grid in GRIDS for kind in KINDS]
    names = [f"{grid[0]}x{grid[1]}-{kind}" if grid else f"tiny-{kind}" for grid, kind in seeds]
    return pytest.mark.parametrize(("grid", "kind"), seeds, ids=names)(test)


def cases(name, grid, kind):
    number = MANY if grid is None else FEW if grid[0] < 27 else 2
    return [Case(name, grid, kind, i, grid=grid, kind=kind) for i in range(number)]


def order(mask, rank=None):
    found = mask.nonzero().flatten().tolist()
    return found if rank is None else sorted(found, key=rank.tolist().__getitem__)


def assert_merges(selection, tile, expected, tokens):
    """The tile's roles, their order, and all weights equal the slow rule's."""
    mix = selection.mix
    for role, patches in expected.roles.items():
        rank = None if mix is None or mix.rank is None else mix.rank[tile]
        assert order(selection.roles[role][tile], rank) == patches, role
    added = torch.zeros(tokens - 1, tokens, dtype=torch.float64)
    extra = torch.zeros(tokens, dtype=torch.float64)
    for patch, weights in expected.added.items():
        for state, weight in weights.items():
            added[patch, state] = weight
    for state, weight in expected.extra.items():
        extra[state] = weight
    assert torch.allclose(mix.added[tile].double(), added, atol=1e-6)
    assert torch.allclose(mix.extra[tile].double(), extra, atol=1e-6)


def assert_keeps_all(selection, tile):
    assert selection.keep[tile].all()
    assert not selection.extras[tile]
    assert selection.mix is None or not selection.mix.added[tile].any()


def sent(selection):
    return [int(n) + e for n, e in zip(selection.keep.sum(1), selection.extras, strict=True)]


# Fast against slow


@each_case
def test_visionzip_merges_what_the_slow_rule_merges(grid, kind):
    merged = 0
    for case in cases("visionzip", grid, kind):
        contextual = case.random.choice([None, None, 0, 1, 2])
        options, budgets = case.options(least=1 + (contextual or 0))
        method = VisionZip(contextual=contextual, **options)
        cls, keys = case.scores(), case.states(8)
        selection = method.select(case.context(cls_attention={SELECT: cls}, keys={SELECT: keys}))
        assert sent(selection) == budgets
        for tile, budget in enumerate(budgets):
            if budget == case.patches:
                assert_keeps_all(selection, tile)
                continue
            expected = slow.visionzip(
                cls[tile].tolist(), keys[tile].double().numpy(), HEADS, budget, contextual
            )
            assert_merges(selection, tile, expected, 1 + case.patches)
            merged += len(expected.added)
    assert merged


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@each_case
def test_prumerge_merges_what_the_slow_rule_merges(grid, kind, plus):
    counts = set()
    for case in cases("prumerge", grid, kind):
        adaptive = case.random.random() < 0.4
        options, budgets = case.options()
        if adaptive:
            options, budgets = {"adaptive": True}, [None] * case.tiles
        neighbours = case.random.choice([0, 1, 3, 32])
        method = (PruMergePlus if plus else PruMerge)(neighbours=neighbours, **options)
        scale = case.random.choice([1, 3, 8])
        keys, queries = case.states(8), scale * case.states(8)
        selection = method.select(case.context(keys={24: keys}, queries={24: queries}))
        if not adaptive:
            assert sent(selection) == budgets
        for tile, budget in enumerate(budgets):
            if budget == case.patches:
                assert_keeps_all(selection, tile)
                continue
            own = (x[tile].double().numpy() for x in (queries[:, 0], keys))
            expected = slow.prumerge(*own, budget, plus=plus, neighbours=neighbours)
            assert_merges(selection, tile, expected, 1 + case.patches)
            counts.add((adaptive, len(expected.roles["important"])))
    assert len(counts) > 2


@each_case
def test_hired_keeps_what_the_slow_rule_keeps(grid, kind):
    empty = 0
    for case in cases("hired", grid, kind):
        mosaics = tuple(case.random.choice(MOSAICS[n] + [None]) for n in case.images)
        alpha = case.random.choice([0.5, 0.5, 0, 1, case.random.random()])
        variant = case.random.choice(["code", "paper"])
        options = case.random.choice(
            [
                {"r_max": case.random.uniform(1e-6, 1)},
                {"r_max": case.random.choice([0.2, 0.1, 0.4, 0.75])},
                {"num_tokens": case.random.randint(max(case.images), 2 * case.patches)},
            ]
        )
        shallow, deep = case.scores(), case.scores()
        method = HiRED(alpha=alpha, variant=variant, **options)
        context = case.context(cls_attention={1: shallow, SELECT: deep}, mosaics=mosaics)
        keep, at = method.select(context).keep, 0
        for tiles, mosaic in zip(case.images, mosaics, strict=True):
            if "num_tokens" in options:
                budget = min(options["num_tokens"], tiles * case.patches)
            else:
                budget = max(1, int(tiles * case.patches * options["r_max"]))
            found = [set(order(mask)) for mask in keep[at : at + tiles]]
            if budget == tiles * case.patches:
                assert all(len(tile) == case.patches for tile in found)
            else:
                expected = slow.hired(
                    shallow[at].tolist(),
                    deep[at : at + tiles].tolist(),
                    case.grid,
                    budget,
                    mosaic,
                    alpha=alpha,
                    variant=variant,
                )
                assert found == expected, f"{method} {case.images} {mosaics}"
                empty += sum(not tile for tile in expected)
            at += tiles
    assert empty or grid  # in many cases some tile has been left with nothing


def assert_keeps(selection, scores, method, case, budgets):
    """The selection is the slow rule's on these scores, a list a tile."""
    for tile, budget in enumerate(budgets):
        if budget == case.patches:
            assert_keeps_all(selection, tile)
            continue
        expected = slow.fopru(scores[tile], case.grid, budget, method.strategy)
        assert set(order(selection.keep[tile])) == expected, f"{method} {case.grid}"


def drawn_fopru(case, attention):
    strategy = case.random.choice(["rank", "row"])
    options, budgets = case.options(least=case.grid[1] if strategy == "row" else 1)
    return FoPru(attention=attention, strategy=strategy, **options), budgets


@each_case
def test_fopru_keeps_what_the_slow_rule_keeps_on_the_softmax(grid, kind):
    for case in cases("softmax", grid, kind):
        method, budgets = drawn_fopru(case, "softmax")
        if kind == "ties":  # eighths, which every order of operations adds up alike
            received, cls = case.scores(), case.scores()
            own = zip(received.tolist(), cls.tolist(), strict=True)
            scores = [
                [
                    Fraction((case.patches + 1) * Fraction(s) - Fraction(c), case.patches)
                    for s, c in both
                ]
                for both in (zip(*tile, strict=True) for tile in own)
            ]
        else:
            shape = case.tiles, 2, 1 + case.patches, 1 + case.patches
            maps = torch.rand(shape, generator=case.generator, dtype=torch.float64)
            received, cls = maps.mean((1, 2))[:, 1:], maps[:, :, 0, 1:].mean(1)
            scores = [slow.fopru_softmax(tile.numpy()) for tile in maps]
        selection = method.select(
            case.context(received_attention={SELECT: received}, cls_attention={SELECT: cls})
        )
        assert_keeps(selection, scores, method, case, budgets)


@each_case
def test_fopru_keeps_what_the_slow_rule_keeps_on_logits(grid, kind):
    compared = 0
    for case in cases("logits", grid, kind):
        method, budgets = drawn_fopru(case, "logits")
        keys, queries = case.states(8), case.states(8)
        selection = method.select(case.context(keys={SELECT: keys}, queries={SELECT: queries}))
        both = zip(queries.double().numpy(), keys.double().numpy(), strict=True)
        scores = [slow.fopru_logits(q, k, HEADS) for q, k in both]
        if any(tied for _, tied in scores):
            continue  # either of the two is right
        assert_keeps(selection, [score for score, _ in scores], method, case, budgets)
        compared += 1
    assert compared > (len(cases("logits", grid, kind)) // 4)


# Sizes, in numbers


@pytest.mark.parametrize(
    ("budget", "dominant", "contextual"),
    [
        *((32, 27, 5), (64, 54, 10), (128, 108, 20), (192, 162, 30), (144, 122, 22)),
        *((288, 243, 45), (432, 364, 68), (1, 1, 0), (2, 2, 0), (16, 14, 2)),
    ],
)
def test_visionzip_sizes_are_those_of_the_authors_calls(budget, dominant, contextual):
    assert VisionZip().sizes(budget) == (dominant - 1, contextual)  # theirs counts CLS


@pytest.mark.parametrize("kind", [VisionZip, PruMerge, PruMergePlus])
def test_a_budget_of_one_token_is_the_one_without_a_patch(kind):
    case = Case("one", kind.name, grid=(4, 4))
    layer = SELECT if kind is VisionZip else SELECT + 1
    keys = case.states(8)
    fields = {
        "cls_attention": {SELECT: case.scores()},
        "keys": {layer: keys},
        "queries": {layer: keys},
    }
    selection = kind(r_max=1 / 16).select(case.context(**fields))
    assert not selection.keep.any()
    assert all(selection.extras)
    if kind is VisionZip:
        assert selection.mix.extra[:, 0].all()
        assert not selection.mix.extra[:, 1:].any()
    else:
        assert not selection.mix.extra[:, 0].any()
        assert (selection.mix.extra[:, 1:] > 0).all()


def test_prumerge_counts_its_outliers_tile_by_tile():
    keys = torch.zeros(2, 17, 4)
    keys[0, 3, 0], keys[1, [5, 9, 11], 0] = 3, 3
    queries = torch.ones(2, 17, 4)
    context = VisionContext(
        (4, 4), keys={24: keys}, queries={24: queries}, depth=DEPTH, feature_layer=SELECT
    )
    selection = PruMerge(adaptive=True).select(context)
    assert [order(tile) for tile in selection.keep] == [[2], [4, 8, 10]]


def test_prumerge_plus_keeps_everything_where_nothing_stands_out_or_too_much_does():
    flat = torch.ones(1, 17, 4)
    context = VisionContext(
        (4, 4), keys={24: flat}, queries={24: flat}, depth=24, feature_layer=SELECT
    )
    selection = PruMergePlus(adaptive=True).select(context)
    assert order(selection.keep[0]) == [0, 5, 10]  # no outlier: the step of a single one
    keys = torch.zeros(1, 17, 4)
    keys[0, [5, 9, 11], 0] = 3
    context = VisionContext(
        (4, 4), keys={24: keys}, queries={24: flat}, depth=24, feature_layer=SELECT
    )
    selection = PruMergePlus(adaptive=True).select(context)
    assert order(selection.keep[0]) == list(range(15))  # 16 // 3 // 3 is one


@pytest.mark.parametrize(("select", "layer"), [(23, 24), (24, 24), (12, 13)])
def test_prumerge_reads_the_layer_after_the_selected_one(select, layer):
    for kind in (PruMerge, PruMergePlus):
        needs = kind().needs(DEPTH, select)
        assert (needs.keys, needs.queries) == ((layer,), (layer,))
        assert (needs.received_attention, needs.cls_attention) == ((), ())


@pytest.mark.parametrize(
    ("method", "read"),
    [
        (VisionZip(), {"cls_attention": (23,), "keys": (23,)}),
        (HiRED(), {"cls_attention": (1, 23), "mosaics": True}),
        (FoPru(), {"received_attention": (23,), "cls_attention": (23,)}),
        (FoPru(attention="logits"), {"keys": (23,), "queries": (23,)}),
    ],
    ids=repr,
)
def test_methods_read_what_their_rules_name_and_nothing_else(method, read):
    needs = method.needs(DEPTH, SELECT)
    defaults = {
        "received_attention": (),
        "cls_attention": (),
        "keys": (),
        "queries": (),
        "mosaics": False,
    }
    assert {name: getattr(needs, name) for name in defaults} == defaults | read
    assert (needs.features, needs.projected, needs.relevance) == (False, False, None)


@pytest.mark.parametrize(("budget", "rows"), [(230, 9), (144, 6), (24, 1), (47, 1)])
def test_fopru_keeps_whole_rows(budget, rows):
    case = Case("rows", grid=(24, 24))
    fields = {
        "received_attention": {SELECT: case.scores()},
        "cls_attention": {SELECT: case.scores()},
    }
    keep = FoPru(r_max=budget / 576, strategy="row").select(case.context(**fields)).keep
    by_row = keep.view(-1, 24, 24).sum(2)
    assert ((by_row == 24).sum(1) == rows).all()
    assert (keep.sum(1) == 24 * rows).all()


def test_hireds_two_variants_cut_the_whole_image_differently():
    case = Case("strips", grid=(8, 8))
    shallow = torch.zeros(5, 64)
    shallow[0, [0, 1, 8, 9]] = 1  # the upper left corner: quadrant 0, and strip 0
    shallow[0, [7, 15, 6, 14]] = 1  # the upper right corner: quadrant 1, and strip 0 again
    deep = torch.rand(5, 64, generator=case.generator)
    context = VisionContext(
        (8, 8),
        cls_attention={1: shallow, SELECT: deep},
        depth=DEPTH,
        feature_layer=SELECT,
        tiles=(5,),
        mosaics=((2, 2),),
    )
    alpha = 56 / 64  # eight patches are marked
    counts = {}
    for variant in ("code", "paper"):
        selection = HiRED(num_tokens=80, alpha=alpha, variant=variant).select(context)
        counts[variant] = selection.keep.sum(1).tolist()
    assert counts == {"code": [64, 16, 0, 0, 0], "paper": [64, 8, 8, 0, 0]}


def test_hired_gives_the_other_tiles_nothing_where_no_patch_is_marked():
    case = Case("none", grid=(4, 4))
    scores = torch.rand(5, 16, generator=case.generator)
    context = VisionContext(
        (4, 4),
        cls_attention={1: scores, 23: scores},
        depth=24,
        feature_layer=23,
        tiles=(5,),
        mosaics=((2, 2),),
    )
    selection = HiRED(num_tokens=40, alpha=1).select(context)
    assert selection.keep.sum(1).tolist() == [16, 0, 0, 0, 0]


# Wrong input


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("visionzip", {"contextual": -1}, ("contextual=-1", "at least 0")),
        ("visionzip", {"contextual": 2.0}, ("contextual=2.0", "integer")),
        ("prumerge", {"adaptive": "yes"}, ("adaptive='yes'", "True", "False")),
        ("prumerge", {"adaptive": True, "r_max": 0.5}, ("adaptive=True", "r_max=0.5")),
        ("prumerge+", {"adaptive": True, "num_tokens": 64}, ("adaptive=True", "num_tokens=64")),
        ("prumerge", {"neighbours": -1}, ("neighbours=-1", "at least 0")),
        ("hired", {"alpha": 1.5}, ("alpha=1.5", "[0, 1]")),
        ("hired", {"alpha": None}, ("alpha=None", "[0, 1]")),
        ("hired", {"variant": "official"}, ("variant='official'", "code", "paper")),
        ("fopru", {"strategy": "column"}, ("strategy='column'", "rank", "row")),
        ("fopru", {"attention": "sigmoid"}, ("attention='sigmoid'", "softmax", "logits")),
    ],
)
def test_a_wrong_option_is_refused_with_its_value_and_the_valid_ones(name, options, words):
    with pytest.raises(OptionError) as caught:
        get_method(name, **options)
    for word in (name, *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (VisionZip(r_max=0.01, contextual=10), ("contextual=10", "11 tokens", "budget is 6")),
        (FoPru(r_max=0.02, strategy="row"), ("whole rows of 24", "budget is 12", "'rank'")),
    ],
)
def test_a_budget_that_the_options_cannot_meet_is_refused_before_anything_runs(method, words):
    with pytest.raises(OptionError) as caught:
        method.check((24, 24))
    for word in words:
        assert word in str(caught.value)


def test_budgets_that_only_the_image_tells_are_refused_when_it_comes():
    case = Case("image", grid=(4, 4))
    scores = torch.rand(5, 16, generator=case.generator)
    whole = {"grid": (4, 4), "depth": 24, "feature_layer": 23, "tiles": (5,), "heads": HEADS}
    fields = whole | {"received_attention": {23: scores}, "cls_attention": {1: scores, 23: scores}}
    with pytest.raises(OptionError, match=r"whole rows of 4.*budget is 3"):
        FoPru(num_tokens=15, strategy="row").select(VisionContext(**fields))
    fields |= {"keys": {23: torch.rand(5, 17, 8)}}
    with pytest.raises(OptionError, match=r"contextual=3.*budget is 3"):
        VisionZip(num_tokens=15, contextual=3).select(VisionContext(**fields))
    fields |= {"mosaics": (None,)}
    with pytest.raises(OptionError, match=r"num_tokens=4.*5 tiles.*at least 5"):
        HiRED(num_tokens=4).select(VisionContext(**fields))


def test_hired_without_the_images_mosaics_is_refused():
    scores = torch.rand(5, 16)
    fields = {"cls_attention": {1: scores, 23: scores}, "depth": 24, "feature_layer": 23}
    with pytest.raises(ContextError, match=r"hired needs mosaics.*5 tiles"):
        HiRED(r_max=0.5).select(VisionContext((4, 4), tiles=(5,), **fields))
    one_each = VisionContext((4, 4), tiles=(1,) * 5, **fields)
    assert HiRED(r_max=0.5).select(one_each).keep.sum(1).tolist() == [8] * 5


def test_visionzip_without_the_number_of_heads_is_refused():
    context = VisionContext(
        (4, 4),
        cls_attention={23: torch.rand(1, 16)},
        keys={23: torch.rand(1, 17, 8)},
        depth=24,
        feature_layer=23,
    )
    with pytest.raises(ContextError, match="visionzip needs heads"):
        VisionZip(r_max=0.5).select(context)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+", "hired", "fopru"])
def test_a_tower_without_cls_is_refused_in_one_line(name):
    method = get_method(name, r_max=0.5)
    keys = torch.rand(1, 16, 8)
    fields = {"keys": {23: keys, 24: keys}, "queries": {23: keys, 24: keys}, "heads": HEADS}
    whole = {"grid": (4, 4), "depth": 24, "feature_layer": 23}
    with pytest.raises(
        UnsupportedModelError, match=rf"^{name.replace('+', '.')} asks the CLS"
    ) as e:
        method.select(VisionContext(**whole, **fields))
    assert "\n" not in str(e.value)
    assert "hiprune" in str(e.value)
    if method.needs(DEPTH, SELECT).cls_attention:
        with pytest.raises(ContextError, match=r"needs the CLS token's attention.*use hiprune"):
            method.select(VisionContext(**whole, received_attention={23: torch.rand(1, 16)}))


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+"])
def test_keys_that_are_not_finite_are_refused(name):
    case = Case("finite", grid=(4, 4))
    keys = case.states(8)
    keys[0, 3, 2] = float("inf")
    layers = {SELECT: keys, SELECT + 1: keys}
    context = case.context(cls_attention={SELECT: case.scores()}, keys=layers, queries=layers)
    with pytest.raises(ScoreError, match=r"keys\[23\]"):
        get_method(name, r_max=0.5).select(context)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+"])
def test_patches_without_length_give_no_nan(name):
    keys = torch.zeros(2, 17, 8)
    layers = {SELECT: keys, SELECT + 1: keys}
    context = VisionContext(
        (4, 4),
        cls_attention={SELECT: torch.zeros(2, 16)},
        keys=layers,
        queries=layers,
        heads=HEADS,
        depth=DEPTH,
        feature_layer=SELECT,
    )
    selection = get_method(name, r_max=0.5).select(context)
    assert sent(selection) == [8, 8]
    tokens, extra = selection.mix.apply(torch.ones(2, 17, 4))
    assert tokens.isfinite().all()
    assert extra.isfinite().all()
