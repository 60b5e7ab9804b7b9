"""Every method of the registry on real LLaVA-1.5 and NeXT: contexts filled, tokens in order."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionModel

from llava_hvp import (
    DivPrune,
    HiRED,
    MMTok,
    PruMerge,
    PruMergePlus,
    Runtime,
    Selection,
    VisionContext,
    VisionMethod,
    VisionZip,
    get_method,
    list_methods,
    prune,
)
from llava_hvp.encoder.vit import layers_of, transformer
from llava_hvp.errors import ScoreError, TextEncoderError, UnsupportedModelError
from llava_hvp.methods.base import Mix
from llava_hvp.methods.mmtok import content_words

KINDS = ["llava-1.5-llama", "llava-next-llama"]
OWN = [
    n for n in list_methods(VisionMethod) if type(get_method(n)).__module__.startswith("llava_hvp.")
]
VARIANTS = {name: get_method(name, r_max=0.25) for name in OWN} | {
    "divprune image": DivPrune(r_max=0.25, scope="image"),
    "fopru logits": get_method("fopru", r_max=0.25, attention="logits"),
    "fopru row": get_method("fopru", r_max=0.25, strategy="row"),
    "hired paper": HiRED(num_tokens=60, variant="paper"),
    "prumerge adaptive": PruMerge(adaptive=True),
    "prumerge+ adaptive": PruMergePlus(adaptive=True),
    "visionzip without contextual": VisionZip(num_tokens=40, contextual=0),
    "visionzip spatial": VisionZip(num_tokens=60),
    "cdpruner negated": get_method("cdpruner", num_tokens=40),
    "cdpruner direct": get_method("cdpruner", num_tokens=40, sign="direct"),
}
RUNTIMES = {"visionzip spatial": Runtime(patch_merge="spatial")}


def question(bundle, pictures, texts):
    """Padded ids and mask of one question a picture, pixels and sizes."""
    rows = [bundle.ids(text)[0] for text in texts]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :], mask[number, length - len(row) :] = row, True
    return ids, mask, bundle.pixels(*pictures), [picture.size for picture in pictures]


def image_tokens(bundle, text, pixels, size):
    """(tokens, D) that the language model gets of one image."""
    ids = bundle.ids(text)
    embeds = bundle.embeds(ids, pixels, [size])[0][0]
    start = int((ids[0] == -200).nonzero())
    return embeds[start : start + len(embeds) - ids.shape[1] + 1]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "llava-next-mistral-unfrozen"])
def test_a_ragged_batch_equals_one_image_at_a_time(kind, name, loaded, photos):
    bundle = loaded(kind)
    pictures = [photos[0], photos[3].resize((300, 900))]
    texts = ["What is this?", "How many cups are on the table, and of what colour?"]
    ids, mask, pixels, sizes = question(bundle, pictures, texts)
    stock = bundle.model
    with prune(stock, VARIANTS[name], runtime=RUNTIMES.get(name)) as pruned:
        alone, reports, sent = [], [], []
        for text, picture in zip(texts, pictures, strict=True):
            one = bundle.pixels(picture)
            alone.append(bundle.generate(bundle.ids(text), one, [picture.size])[0])
            reports += pruned.last
            sent.append(image_tokens(bundle, text, one, picture.size))
        together = bundle.generate(ids, pixels, sizes, attention_mask=mask)
        assert torch.equal(together, torch.stack(alone))
        for one, other, tokens, picture in zip(pruned.last, reports, sent, pictures, strict=True):
            assert torch.equal(one.selection.keep, other.selection.keep)
            assert one.kept_tokens == other.kept_tokens == len(tokens)
            assert one.tile_tokens == other.tile_tokens
            extras = sum(one.selection.extras)
            assert sum(one.tile_tokens) == one.kept_patches + extras
            newlines = one.kept_tokens - sum(one.tile_tokens)
            assert newlines == 0 or bundle.is_next
            assert f"{one.kept_tokens} of" in repr(one)
            assert f"{one.kept_patches} of" in repr(one)
            assert one.overlay(picture).width > 0
    assert "llava_hvp" not in vars(stock)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_stock_to_the_bit(kind, name, loaded, photos):
    bundle = loaded(kind)
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    expected = bundle.embeds(*arguments)[0]
    with prune(bundle.model, get_method(name, r_max=1)) as pruned:
        assert torch.equal(expected, bundle.embeds(*arguments)[0])
        assert pruned.last[0].selection.mix is None
        assert pruned.last[0].kept_of_stock == 1


@pytest.mark.parametrize("name", OWN)
def test_budgets_are_met_and_the_model_is_given_back(name, own, photos):
    bundle = own("llava-next-llama")
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    modules = bundle.model.get_vision_tower().vision_tower.modules
    hooks = [list(module._forward_hooks) for module in modules()]
    arguments = bundle.ids("Where is it?"), bundle.pixels(photos[0]), [photos[0].size]
    with prune(bundle.model, get_method(name, num_tokens=100)) as pruned:
        bundle.embeds(*arguments)
        report = pruned.last[0]
        during = bundle.model.state_dict()
        assert all(torch.equal(before[key], during[key]) for key in before)
    assert before.keys() == bundle.model.state_dict().keys()
    assert hooks == [list(module._forward_hooks) for module in modules()]
    selected = report.selection.keep.sum() + sum(report.selection.extras)
    assert 0 < int(selected) <= 100
    if name in ("divprune", "scope", "mmtok", "cdpruner", "vispruner", "fastervlm", "visionzip"):
        assert int(selected) == 100


# What the contexts hold


@pytest.fixture
def contexts(monkeypatch):
    """The contexts that methods were given, in order."""
    seen = []
    stock = VisionMethod.select_unchecked

    def select_unchecked(method, context):
        seen.append(context)
        return stock(method, context)

    monkeypatch.setattr(VisionMethod, "select_unchecked", select_unchecked)
    return seen


def test_keys_and_queries_are_the_towers_own(contexts, loaded, photos):
    bundle, photo = loaded("llava-1.5-llama"), photos[0]
    tower = bundle.model.get_vision_tower().vision_tower
    with torch.no_grad():
        states = tower(bundle.pixels(photo), output_hidden_states=True).hidden_states
    layer = layers_of(tower)[23]  # the one after the layer that is handed on
    normed = layer.layer_norm1(states[23])
    for method, number in ((PruMerge(r_max=0.25), 24), (VisionZip(r_max=0.25), 23)):
        with prune(bundle.model, method):
            bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
        block = layers_of(tower)[number - 1]
        normed = block.layer_norm1(states[number - 1])
        expected = block.self_attn.k_proj(normed)
        assert torch.allclose(contexts[-1].keys[number], expected, atol=1e-4)
        if number == 24:
            query = block.self_attn.q_proj(normed)
            assert torch.allclose(contexts[-1].queries[24], query, atol=1e-4)
            assert set(contexts[-1].keys) == set(contexts[-1].queries) == {24}
        assert contexts[-1].heads == transformer(tower).config.num_attention_heads


def test_no_layer_after_the_selected_one_is_run(own, photos):
    bundle, ran = own("llava-1.5-llama"), []
    for number, layer in enumerate(layers_of(bundle.model.get_vision_tower().vision_tower), 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with prune(bundle.model, PruMerge(r_max=0.25)):
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size])
    assert ran == list(range(1, 24))


def test_mosaics_are_what_anyres_cut_and_none_where_tiles_stand_alone(
    contexts, own, loaded, photos
):
    wide, tall = photos[0].resize((900, 300)), photos[0].resize((300, 600))
    bundle = own("llava-next-llama")
    two = bundle.ids("Which?", images=2), bundle.pixels(wide, tall), [wide.size, tall.size]
    with prune(bundle.model, HiRED(num_tokens=60)) as pruned:
        bundle.embeds(*two)
        assert contexts[-1].mosaics == ((1, 3), (2, 1))
        assert [len(r.tile_tokens) for r in pruned.last] == [4, 3]
        assert all(sum(r.tile_tokens) <= 60 for r in pruned.last)
        assert pruned.last[0].tile_tokens[0] == 30
        bundle.model.config.mm_patch_merge_type = "flat"
        bundle.embeds(*two)
        assert contexts[-1].mosaics == (None, None)
        assert [r.tile_tokens for r in pruned.last] == [(15,) * 4, (20,) * 3]
    several = loaded("llava-1.5-llama")
    with prune(several.model, HiRED(num_tokens=60)):
        several.embeds(several.ids("Which?", images=2), several.pixels(wide, tall), two[2])
        assert contexts[-1].mosaics == (None, None)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (512, 512), (900, 100), (3, 400)])
def test_padding_is_what_the_square_adds(size, contexts, loaded, photos):
    from llava.mm_utils import expand2square

    bundle, photo = loaded("llava-1.5-llama"), photos[0].resize(size)
    with prune(bundle.model, MMTok(r_max=0.25)) as pruned:
        bundle.embeds(bundle.ids("Where is it?"), bundle.pixels(photo), [size])
    white = photo.point(lambda _: 255)
    square = expand2square(white, (0, 0, 0)).convert("L").resize((112, 112), box=None, resample=4)
    shown = torch.tensor(list(square.getdata()), dtype=torch.float).view(1, 112, 112)
    expected = functional.max_pool2d(shown, 14).flatten() == 0
    assert torch.equal(contexts[-1].padding[0], expected)
    assert bool(expected.any()) == (max(size) > 1.3 * min(size))
    if int((~expected).sum()) >= 16:
        assert not (pruned.last[0].selection.keep[0] & expected).any()


def test_padding_without_a_size_is_refused_and_anyres_has_none(contexts, loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with (
        prune(bundle.model, MMTok(r_max=0.25)),
        pytest.raises(UnsupportedModelError, match="pass these images' image_sizes"),
    ):
        bundle.embeds(bundle.ids("Where?"), bundle.pixels(photos[0]), None)
    bundle = loaded("llava-next-llama")
    with prune(bundle.model, MMTok(r_max=0.25)):
        bundle.embeds(bundle.ids("Where?"), bundle.pixels(photos[0]), [photos[0].size])
    assert not contexts[-1].padding.any()


def test_words_are_those_of_each_images_own_prompt(contexts, loaded, photos):
    bundle = loaded("llava-1.5-llama")
    texts = [
        "What colour is the cup?\nAnswer the question using a single word or phrase.",
        "Where?",
    ]
    ids, mask, pixels, sizes = question(bundle, photos[:2], texts)
    with prune(bundle.model, MMTok(r_max=0.25)):
        bundle.embeds(ids, pixels, sizes, attention_mask=mask)
    embed = bundle.model.get_model().embed_tokens
    for text, words in zip(texts, contexts[-1].words, strict=True):
        ids = [
            token
            for word in content_words(text).split()
            for token in bundle.tokenizer(word, add_special_tokens=False)["input_ids"]
        ]
        assert torch.equal(words, embed(torch.tensor(ids)))
    assert content_words(texts[0]) == "colour cup"


def test_projected_patches_are_what_the_language_model_would_get(contexts, loaded, photos):
    bundle, photo = loaded("llava-1.5-llama"), photos[0]
    stock = image_tokens(bundle, "x", bundle.pixels(photo), photo.size)
    with prune(bundle.model, DivPrune(r_max=0.25)):
        bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
    assert torch.allclose(contexts[-1].projected[0], stock, atol=1e-5)


def test_a_prompt_that_did_not_come_is_asked_for(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with (
        prune(bundle.model, MMTok(r_max=0.25)) as pruned,
        pytest.raises(TextEncoderError, match="mmtok reads the prompt, and none came"),
    ):
        pruned.encode(bundle.pixels(photos[0]), (1,), None, sizes=[photos[0].size])


def test_a_tower_without_cls_is_refused_by_those_that_ask_it(own, photos):
    bundle = own("llava-1.5-llama")
    tower = transformer(bundle.model.get_vision_tower().vision_tower)
    del tower.embeddings.class_embedding
    asking = [name for name in OWN if get_method(name).needs_cls]
    assert {"visionzip", "scope", "hired", "prumerge"} < set(asking) < set(OWN)
    for name in asking:
        with pytest.raises(UnsupportedModelError, match=r"^\S+ asks the CLS token[^\n]*$"):
            prune(bundle.model, get_method(name, r_max=0.25))
        assert "llava_hvp" not in vars(bundle.model)
    for name in set(OWN) - set(asking):
        prune(bundle.model, get_method(name, r_max=0.25)).take_back()


@pytest.fixture(scope="module")
def eager_pass(loaded):
    """A function of a bundle and pixels: its tower with eager attention, and all that it gives."""
    passes = {}

    def of(bundle, pixels):
        if bundle.path not in passes:
            tower = bundle.model.get_vision_tower()
            eager = CLIPVisionModel.from_pretrained(
                tower.vision_tower_name, attn_implementation="eager"
            )
            eager.load_state_dict(tower.vision_tower.state_dict())
            with torch.no_grad():
                passes[bundle.path] = (
                    eager,
                    eager(pixels, output_attentions=True, output_hidden_states=True),
                )
        return passes[bundle.path]

    return of


def context_by_hand(bundle, needs, eager, seen):
    """What the rule is to read of photo 2 and of "Is there a cup?", computed apart from ours."""
    states, model = seen.hidden_states, bundle.model.get_model()
    features = states[23][:, 1:]

    def projections(side, layers):
        blocks = {layer: layers_of(eager)[layer - 1] for layer in layers}
        return {
            layer: getattr(block.self_attn, f"{side}_proj")(block.layer_norm1(states[layer - 1]))
            for layer, block in blocks.items()
        }

    words = bundle.tokenizer("there cup", add_special_tokens=False, return_tensors="pt")
    # 600 x 400 in a square: 100 of 600 pixels above and below, 4 of 24 rows.
    padded = (torch.arange(576) // 24 - 11.5).abs() > 8
    return VisionContext(
        (24, 24),
        {n: seen.attentions[n - 1].mean((1, 2))[:, 1:] for n in needs.received_attention},
        depth=24,
        feature_layer=23,
        cls_attention={n: seen.attentions[n - 1][:, :, 0, 1:].mean(1) for n in needs.cls_attention},
        features=features,
        tiles=(len(features),),
        keys=projections("k", needs.keys),
        queries=projections("q", needs.queries),
        heads=eager.config.num_attention_heads,
        projected=model.mm_projector(features),
        words=(model.embed_tokens(words["input_ids"][0]),),
        padding=(padded & (not bundle.is_next)).expand(len(features), -1),
        mosaics=((2, 2) if bundle.is_next else None,),
    )


# VisPruner ranks by differences that rounding decides, as CDPruner does once it has chosen more
# patches than the 64 dimensions of these tiny models hold; with fewer it is here.
EXACT = [name for name in VARIANTS if name not in ("random", "uniform", "vispruner", "cdpruner")]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["llava-1.5-336", "llava-next-336"])
def test_selections_are_the_rule_on_what_transformers_itself_gives(
    kind, name, loaded, photos, eager_pass
):
    bundle, photo, method = loaded(kind), photos[2], VARIANTS[name]
    pixels, ids = bundle.pixels(photo), bundle.ids("Is there a cup?")
    with torch.no_grad():
        eager, seen = eager_pass(bundle, pixels.flatten(0, -4))
        context = context_by_hand(bundle, method.needs(24, 23), eager, seen)
        with prune(bundle.model, method) as pruned:
            bundle.embeds(ids, pixels, [photo.size])
            report = pruned.last[0]
            relevance = pruned.relevance(context.images, [ids[0]])
            if relevance is not None:
                found = relevance(context.features)
                context = dataclasses.replace(context, relevance=found)
        expected = method.select(context)
    assert torch.equal(report.selection.keep, expected.keep)
    for role, mask in expected.roles.items():
        assert torch.equal(report.selection.roles[role], mask)
    if expected.mix is not None:
        assert torch.allclose(report.selection.mix.added, expected.mix.added, atol=1e-5)


# Merging


def in_order(method, report, place):
    """(tile, patch) of each token sent, patch None for one that stands at none; None: newline."""
    selection, patches = report.selection, report.selection.keep.shape[1]
    loose = selection.loose(method.loose)

    def placed(tokens):
        tokens = [divmod(token, patches) for token in tokens.tolist()]
        return [place for place in tokens if selection.keep[place] and not loose[place]]

    def behind(tile):
        own = loose[tile].nonzero()[:, 0].tolist()
        if selection.mix.rank is not None:
            own.sort(key=selection.mix.rank[tile].tolist().__getitem__)
        return [(tile, patch) for patch in own] + last[tile : tile + 1]

    extras = [(tile, None) for tile in range(report.tiles)]
    first, last = (extras, []) if method.extra_first else ([], extras)
    order = first[:1] + placed(place.base) + behind(0)
    for row in [] if place.mosaic is None else place.mosaic:
        here = placed(row)
        order += here + [None] * (place.newline and len(here) > 0)
    order += first[1:]
    for tile in range(1, report.tiles):
        order += behind(tile)
    return order


@pytest.mark.parametrize("kind", [*KINDS, "llava-next-spatial"])
@pytest.mark.parametrize("method", [VisionZip(r_max=0.25), PruMerge(r_max=0.25)])
def test_merged_tokens_are_sent_in_order_and_the_others_stay_to_the_bit(
    method, kind, loaded, photos
):
    bundle, photo = loaded(kind), photos[3].resize((300, 900))
    pixels = bundle.pixels(photo)
    with prune(bundle.model, method) as pruned:
        sent = image_tokens(bundle, "x", pixels, photo.size)
        report = pruned.last[0]
        place = pruned.host_model.layout(report.tiles, photo.size, "stock")
        states, _ = bundle.model.get_vision_tower().run_to_layer(pixels.flatten(0, -4))
    mix = report.selection.mix
    at_patches, extra = mix.apply(states)
    untouched = mix.added.abs().sum(-1) == 0
    assert torch.equal(at_patches[untouched], states[:, 1:][untouched])
    assert untouched.any()
    assert not untouched[report.selection.keep].all()
    order = in_order(method, report, place)
    assert len(sent) == len(order) == report.kept_tokens
    assert int(report.sent.sum()) == sum(t is not None and t[1] is not None for t in order)
    model = bundle.model.get_model()
    for token, row in zip(order, sent, strict=True):
        if token is None:
            assert torch.equal(row, model.image_newline)
            continue
        tile, patch = token
        state = extra[tile] if patch is None else at_patches[tile, patch]
        with torch.no_grad():
            assert torch.allclose(row, model.mm_projector(state), atol=1e-5)


def test_the_tower_alone_hands_extra_tokens_on(loaded, photos):
    bundle = loaded("llava-next-llama")
    pixels = bundle.pixels(photos[0])[0]
    with prune(bundle.model, VisionZip(r_max=0.25)):
        tower = bundle.model.get_vision_tower()
        tiles = tower(pixels)
        states, _ = tower.run_to_layer(pixels)
    assert [len(tile) for tile in tiles] == [16] * 5
    for tile, state in zip(tiles, states, strict=True):
        assert torch.equal(tile[0], state[0])


def test_merges_are_found_again_where_encodings_are_reused(loaded, photos):
    bundle = loaded("llava-next-llama")
    arguments = bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size]
    with prune(bundle.model, PruMerge(r_max=0.25)) as pruned:
        pruned.reuse = True
        first = bundle.embeds(*arguments)[0]
        assert torch.equal(first, bundle.embeds(*arguments)[0])
        assert pruned.last[0].reused


def test_hired_does_not_find_the_budgets_of_another_arrangement(own, photos):
    bundle, size = own("llava-next-llama"), photos[0].size
    pixels = bundle.pixels(photos[0])
    with prune(bundle.model, HiRED(num_tokens=60)) as pruned:
        pruned.reuse = True
        bundle.embeds(bundle.ids("x"), pixels, [size])
        laid_out = pruned.last[0].tile_tokens
        bundle.model.config.mm_patch_merge_type = "flat"
        bundle.embeds(bundle.ids("x"), pixels, [size])
        assert not pruned.last[0].reused
        assert pruned.last[0].tile_tokens == (12,) * 5 != laid_out


def test_another_projector_is_seen_where_encodings_are_reused(own, photos):
    bundle = own("llava-1.5-llama")
    arguments = bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size]
    with prune(bundle.model, DivPrune(r_max=0.25)) as pruned:
        pruned.reuse = True
        bundle.embeds(*arguments)
        with torch.no_grad():
            next(bundle.model.get_model().mm_projector.parameters()).mul_(-1)
        bundle.embeds(*arguments)
        assert not pruned.last[0].reused
        bundle.embeds(*arguments)
        assert pruned.last[0].reused


class Overflowing(VisionZip):
    """Adds up to infinity. Not registered: no own name."""

    def choose(self, context, budget):
        selection = super().choose(context, budget)
        added = selection.mix.added.clone()
        added[:, 0] = 3e38
        return Selection(selection.keep, selection.roles, Mix(added, selection.mix.extra))


def test_merged_features_that_are_not_finite_are_refused(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with (
        prune(bundle.model, Overflowing(r_max=0.25)),
        pytest.raises(ScoreError, match="merged features not finite"),
    ):
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size])
