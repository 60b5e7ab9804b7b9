"""What methods read and return: shapes, parts of a context, and mixtures of states."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava_hvp import Mix, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.errors import ContextError, ScoreError, UnsupportedModelError

GRID, PATCHES = (2, 3), 6
IMAGES = (1, 3, 5, 1)
MOSAICS = (None, (1, 2), (2, 2), None)


def whole_context(**changes):
    """Four images of ten tiles, everything in it; row t of each tensor says t."""
    total = sum(IMAGES)
    row = torch.arange(total, dtype=torch.float32)
    fields = {
        "received_attention": {9: row[:, None].expand(total, PATCHES)},
        "cls_attention": {23: row[:, None].expand(total, PATCHES)},
        "features": row[:, None, None].expand(total, PATCHES, 4),
        "relevance": row[:, None].expand(total, PATCHES),
        "keys": {24: row[:, None, None].expand(total, 1 + PATCHES, 8)},
        "queries": {24: row[:, None, None].expand(total, 1 + PATCHES, 8)},
        "projected": row[:, None, None].expand(total, PATCHES, 5),
        "padding": torch.zeros(total, PATCHES, dtype=torch.bool),
        "words": tuple(torch.full((1 + i, 5), float(i)) for i in range(len(IMAGES))),
        "mosaics": MOSAICS,
        "heads": 2,
        "tiles": IMAGES,
    }
    return VisionContext(GRID, **(fields | changes))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keys": {24: torch.rand(10, 8, 8)}}, ("keys[24]", "(10, 8, 8)", "6 or with CLS 7")),
        ({"queries": {24: torch.rand(9, 7, 8)}}, ("queries[24]", "(9, 7, 8)", "(10, 6 or")),
        ({"keys": {24: torch.rand(10, 7)}}, ("keys[24]", "(10, 7)", "D)")),
        ({"heads": 3}, ("heads=3", "width", "8")),
        ({"heads": 0}, ("heads=0", "width")),
        ({"projected": torch.rand(10, 7, 5)}, ("projected", "(10, 7, 5)", "(10, 6, P)")),
        ({"projected": torch.rand(10, 6)}, ("projected", "(10, 6, P)")),
        ({"padding": torch.zeros(10, 5, dtype=torch.bool)}, ("padding", "(10, 5)", "(10, 6)")),
        ({"padding": torch.zeros(10, 6)}, ("padding", "torch.float32", "torch.bool")),
        ({"words": (torch.rand(2, 5),)}, ("words", "1 entries", "4 images")),
        ({"words": (torch.rand(2, 4),) * 4}, ("words", "(2, 4)", "(M, 5)")),
        ({"words": (torch.rand(5),) * 4}, ("words", "(5,)", "(M, 5)")),
        ({"words": (torch.rand(5),) * 4, "projected": None}, ("words", "(M, P)")),
        ({"mosaics": (None, (1, 2))}, ("mosaics", "2 entries", "4 images")),
        ({"mosaics": (None, (1, 3), (2, 2), None)}, ("mosaics", "(1, 3)", "3 tiles")),
        ({"mosaics": (None, (-1, -2), (2, 2), None)}, ("mosaics", "(-1, -2)", "3 tiles")),
    ],
)
def test_a_context_whose_shapes_disagree_is_refused(fields, words):
    assert whole_context().total_tiles == 10
    with pytest.raises(ContextError) as caught:
        whole_context(**fields)
    for word in words:
        assert word in str(caught.value)


def test_a_tower_without_cls_gives_keys_of_patches_only():
    context = VisionContext(GRID, keys={23: torch.rand(2, PATCHES, 8)}, heads=4)
    assert (context.total_tiles, context.images) == (2, (2,))
    assert context.score("keys", 23).shape == (2, PATCHES, 8)


@pytest.mark.parametrize("kind", ["keys", "queries"])
def test_keys_that_are_missing_are_named_with_those_held(kind):
    with pytest.raises(ContextError, match=rf"needs {kind} of layer 23; the context holds \[24\]"):
        whole_context().score(kind, 23)


@pytest.mark.parametrize("name", ["features", "projected", "relevance"])
def test_what_a_method_reads_and_the_context_lacks_is_named(name):
    assert whole_context().read(name, "m").dtype == torch.float32
    with pytest.raises(ContextError, match=rf"m needs {name} \(T, N.*it has none"):
        whole_context(**{name: None}, words=None).read(name, "m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", {24: torch.full((10, 7, 8), float("nan"))}),
        ("queries", {24: torch.full((10, 7, 8), float("inf"))}),
        ("projected", torch.full((10, 6, 5), float("nan"))),
        ("words", (*(torch.zeros(2, 5),) * 3, torch.full((2, 5), float("nan")))),
    ],
    ids=["keys", "queries", "projected", "words"],
)
def test_what_is_not_finite_is_named(name, value):
    names, finite = whole_context().finite()
    assert finite.tolist() == [True] * len(names) == [True] * 11
    names, finite = whole_context(**{name: value}).finite()
    bad = [n for n, ok in zip(names, finite.tolist(), strict=True) if not ok]
    assert bad == {"keys": ["keys[24]"], "queries": ["queries[24]"], "words": ["words[3]"]}.get(
        name, [name]
    )
    with pytest.raises(ScoreError, match=name):
        AsManyAsTheBudget(r_max=0.5).select(whole_context(**{name: value}))


@pytest.mark.parametrize(
    ("index", "tiles", "images"),
    [
        ([1, 2, 3, 9], (3, 1), [1, 3]),
        ([4, 5, 6, 7, 8], (5,), [2]),
        ([0, 9], (1, 1), [0, 3]),
    ],
)
def test_rows_take_the_tiles_and_the_images_entries_with_them(index, tiles, images):
    part = whole_context().rows(torch.tensor(index), tiles)
    assert (part.tiles, part.total_tiles) == (tiles, len(index))
    for tensor in (
        *(part.score(kind, 24) for kind in ("keys", "queries")),
        *(part.score("received_attention", 9), part.score("cls_attention", 23)),
        *(part.read(name, "m") for name in ("features", "projected", "relevance")),
    ):
        assert tensor.flatten(1)[:, 0].tolist() == index
        assert tensor.flatten(1)[:, -1].tolist() == index
    assert part.padding.shape == (len(index), PATCHES)
    assert [(len(words), words[0, 0].item()) for words in part.words] == [
        (1 + image, image) for image in images
    ]
    assert part.mosaics == tuple(MOSAICS[image] for image in images)
    assert part.heads == 2


# Mixtures of states


def random_mix(tiles=2, tokens=1 + PATCHES, **changes):
    generator = torch.Generator().manual_seed(0)
    added = torch.rand(tiles, PATCHES, tokens, generator=generator)
    added[:, ::2] = 0
    extra = torch.rand(tiles, tokens, generator=generator)
    return Mix(added, **({"extra": extra} | changes))


@pytest.mark.parametrize("cls_tokens", [0, 1])
def test_a_mix_adds_weighted_states_to_a_patchs_own(cls_tokens):
    states = torch.randn(2, cls_tokens + PATCHES, 4)
    mix = random_mix(tokens=cls_tokens + PATCHES)
    tokens, extra = mix.apply(states)
    for tile in range(2):
        for patch in range(PATCHES):
            expected = states[tile, cls_tokens + patch].clone()
            for weight, state in zip(mix.added[tile, patch], states[tile], strict=True):
                expected += weight * state
            assert torch.allclose(tokens[tile, patch], expected, atol=1e-6)
        expected = sum(w * s for w, s in zip(mix.extra[tile], states[tile], strict=True))
        assert torch.allclose(extra[tile], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_patches_into_which_nothing_flows_keep_their_bits(dtype):
    states = torch.randn(2, 1 + PATCHES, 4).to(dtype)
    tokens, extra = random_mix().apply(states)
    assert tokens.dtype == extra.dtype == dtype
    assert torch.equal(tokens[:, ::2], states[:, 1::2])
    assert not torch.equal(tokens[:, 1::2], states[:, 2::2])


def test_sums_of_half_precision_are_taken_in_float32():
    states = torch.full((1, 1 + PATCHES, 1), 2048, dtype=torch.float16)
    states[0, 1:] = 1  # 2048 + 1 is 2048 in float16: taken there, six ones would be lost
    mix = Mix(torch.zeros(1, PATCHES, 1 + PATCHES), torch.ones(1, 1 + PATCHES))
    assert mix.apply(states)[1].item() == 2054


def test_a_mix_without_an_extra_token_gives_none():
    tokens, extra = random_mix(extra=None).apply(torch.randn(2, 1 + PATCHES, 4))
    assert tokens.shape == (2, PATCHES, 4)
    assert extra is None


@dataclass(frozen=True, kw_only=True)
class AsManyAsTheBudget(VisionMethod):
    """The first patches of each tile, whose tokens hold as much of CLS as the budget is."""

    name: ClassVar[str] = "as-many-of-a-test"
    summary: ClassVar[str] = "the first patches"
    roles: ClassVar[tuple[str, ...]] = ("first", "second")
    loose: ClassVar[tuple[str, ...]] = ("second",)
    listed: ClassVar[bool] = False

    def choose(self, context, budget):
        place = torch.arange(context.patches).expand(context.total_tiles, -1)
        added = torch.zeros(*place.shape, 1 + context.patches)
        added[..., 0] = budget
        extra = torch.full((context.total_tiles, 1 + context.patches), float(budget))
        first, second = place < budget - 1, place == budget - 1
        return Selection.from_roles(
            {"first": first, "second": second}, mix=Mix(added, extra, place + budget)
        )


def test_images_of_several_budgets_keep_their_mixtures():
    # 8 tokens: 6 of 6 patches for an image of one tile, 2 a tile of three, 1 a tile of five.
    selection = AsManyAsTheBudget(num_tokens=8).select(whole_context())
    shares = [6] + 3 * [2] + 5 * [1] + [6]
    assert selection.keep.sum(1).tolist() == shares
    mixed = [share < PATCHES for share in shares]
    assert selection.mix.mixed == selection.extras == tuple(mixed)
    # A tile that keeps everything is as it was: nothing flows, nothing is loose.
    for tile, share in enumerate(shares):
        held = float(share) if mixed[tile] else 0.0
        assert (selection.mix.added[tile, :, 0] == held).all()
        assert not selection.mix.added[tile, :, 1:].any()
        assert (selection.mix.extra[tile] == held).all()
        loose = selection.loose(AsManyAsTheBudget.loose)[tile].nonzero().flatten().tolist()
        assert loose == ([share - 1] if mixed[tile] else [])
        if mixed[tile]:
            assert selection.mix.rank[tile].tolist() == [share + i for i in range(PATCHES)]


def test_one_budget_keeps_its_mixture_as_the_method_gave_it():
    selection = AsManyAsTheBudget(r_max=0.5).select(whole_context())
    assert selection.mix.mixed is None
    assert selection.extras == (True,) * 10
    assert selection.loose(["second"]).sum(1).tolist() == [1] * 10


def test_a_budget_of_all_patches_mixes_nothing():
    for method in (AsManyAsTheBudget(r_max=1), AsManyAsTheBudget(num_tokens=60)):
        selection = method.select(whole_context())
        assert selection.keep.all()
        assert selection.mix is None
        assert not any(selection.extras)
        assert not selection.loose(["first", "second"]).any()


def test_a_selection_without_a_mix_has_nothing_loose_and_no_extra_tokens():
    keep = torch.ones(2, PATCHES, dtype=torch.bool)
    selection = Selection.from_roles({"kept": keep})
    assert selection.extras == (False, False)
    assert not selection.loose(["kept"]).any()
    with_mix = Selection.from_roles({"kept": keep}, mix=random_mix(extra=None))
    assert with_mix.extras == (False, False)
    assert with_mix.loose(["kept"]).all()


# Budgets of an image


@dataclass(frozen=True, kw_only=True)
class FirstOfTheImage(VisionMethod):
    """The first patches of an image, whatever tile they are in."""

    name: ClassVar[str] = "first-of-an-image-of-a-test"
    summary: ClassVar[str] = "the first patches of an image"
    roles: ClassVar[tuple[str, ...]] = ("first",)
    listed: ClassVar[bool] = False

    @property
    def of_image(self):
        return True

    def budget(self, patches, tiles=1):
        return min(self.num_tokens, patches * tiles)

    def choose(self, context, budget):
        assert len(set(context.images)) == 1
        place = torch.arange(context.images[0] * context.patches) < budget
        return Selection.from_roles(
            {"first": place.view(-1, context.patches).repeat(len(context.images), 1)}
        )


def test_a_budget_of_an_image_is_shared_by_its_tiles_as_the_method_decides():
    selection = FirstOfTheImage(num_tokens=8).select(whole_context())
    assert selection.keep.sum(1).tolist() == [6, 6, 2, 0, 6, 2, 0, 0, 0, 6]
    assert FirstOfTheImage(num_tokens=30).select(whole_context()).keep.all()


# Methods that ask CLS


@dataclass(frozen=True, kw_only=True)
class AsksCls(AsManyAsTheBudget):
    name: ClassVar[str] = "asks-cls-of-a-test"
    listed: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = True

    def reads(self, depth, feature_layer):
        return Needs(cls_attention=(23,), keys=(24,))


def test_a_tower_without_cls_is_refused_by_a_method_that_asks_it():
    assert AsksCls(r_max=0.5).select(whole_context()).keep.any()
    no_cls = whole_context(keys={24: torch.rand(10, PATCHES, 8)})
    with pytest.raises(UnsupportedModelError, match=r"asks-cls-of-a-test asks the CLS token.*use"):
        AsksCls(r_max=0.5).select(no_cls)
    with pytest.raises(ContextError, match=r"asks-cls-of-a-test needs the CLS token's.*use"):
        AsksCls(r_max=0.5).select(whole_context(cls_attention={}))
    assert AsksCls(r_max=1).select(no_cls).keep.all()
    assert AsManyAsTheBudget(r_max=0.5).select(no_cls).keep.any()
