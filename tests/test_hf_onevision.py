"""LLaVA-OneVision of transformers: a SigLIP tower without CLS, and several images a row."""

import copy

import hf_families as tiny
import pytest
import reference
import torch
from hf_families import DEPTH, PATCHES, assert_keeping_all_is_stock, generate, logits
from hf_models import needs_release

from llava_hvp import HIVTP, FasterVLM, HiPrune, Random, Runtime, Uniform, prune
from llava_hvp.errors import UnsupportedModelError

pytestmark = needs_release

GRID = (PATCHES, PATCHES)
WIDE, TALL, SMALL = (150, 400), (330, 130), (100, 100)
LARGE = (448, 448)  # 16 tiles: stock interpolates their features
ROWS = {
    "one": [([WIDE], 5)],
    "ragged": [([WIDE], 5), ([TALL], 9), ([SMALL], 2)],
    "2, 0 and 1 images": [([WIDE, TALL], 5), ([], 6), ([SMALL], 3)],
    "text": [([], 6)],
}


@pytest.fixture(scope="module")
def model():
    return tiny.onevision()


@pytest.fixture(scope="module")
def eager(model):
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
def test_keeping_everything_is_stock_bit_for_bit(rows, side, model):
    assert_keeping_all_is_stock(model, tiny.pictures(ROWS[rows], side))


def hivtp(maps, budget):
    layers = reference.default_layers((7, 8, 9, 10), DEPTH, DEPTH)
    return reference.hivtp([maps[layer] for layer in layers], GRID, budget)


def hiprune(maps, budget):
    (middle,) = reference.default_layers((9,), DEPTH, DEPTH)
    return reference.hiprune(maps[middle], maps[DEPTH], GRID, budget)


METHODS = {
    "hivtp": (HIVTP(r_max=0.5), lambda maps: hivtp(maps, 32)),
    "hiprune": (HiPrune(r_max=0.25), lambda maps: hiprune(maps, 16)),
    "uniform": (Uniform(r_max=0.3), lambda maps: reference.uniform(PATCHES**2, 19)),
}


@torch.no_grad()
def slow_image(model, tiles, size, cut, rule):
    """The embeddings that are sent of one image, and the patches kept of each tile."""
    inner, kept, features = model.model, [], []
    for tile in tiles:
        seen = inner.vision_tower(tile[None], output_attentions=True, output_hidden_states=True)
        maps = {
            layer: reference.float32(attention[0].mean((0, 1)).tolist())
            for layer, attention in enumerate(seen.attentions, 1)
        }
        kept.append(reference.kept(rule(maps)))
        states = seen.hidden_states[-1][0]
        features.append([inner.multi_modal_projector(state[None])[0] for state in states])
    sent = [features[0][patch] for patch in sorted(kept[0])]
    if not cut:
        return [*sent, inner.image_newline], kept
    across = tiny.arrangement(size)[1]
    rows, columns = tiny.shown_of(size)
    for row in rows:
        line = []
        for column in columns:
            tile = 1 + row // PATCHES * across + column // PATCHES
            patch = row % PATCHES * PATCHES + column % PATCHES
            if patch in kept[tile]:
                line.append(features[tile][patch])
        sent += [*line, inner.image_newline] if line else []
    return sent, kept


@torch.no_grad()
def slow_row(model, ids, images, rule, tokens):
    """Greedy ids of one row by itself without a cache, its last logits, and what was kept."""
    parts, kept, position = [], [], 0
    while position < len(ids):
        if ids[position] != tiny.IMAGE:
            parts.append(model.get_input_embeddings()(ids[position]))
            position += 1
            continue
        tiles, size, cut, stock = images.pop(0)
        sent, own = slow_image(model, tiles, size, cut, rule)
        kept.append(own)
        parts += sent
        position += stock
    assert not images
    found, first = [], None
    for _ in range(tokens):
        sequence = torch.stack(parts)[None]
        states = model.model.language_model(inputs_embeds=sequence, use_cache=False)[0]
        scores = model.lm_head(states[0, -1])
        first = scores if first is None else first
        found.append(int(scores.argmax()))
        parts.append(model.get_input_embeddings()(torch.tensor(found[-1])))
    return found, first, kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ["ragged", "2, 0 and 1 images"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_what_each_row_is_by_itself_slowly(name, rows, side, model, eager):
    method, rule = METHODS[name]
    inputs = tiny.pictures(ROWS[rows], side)
    with prune(model, method, runtime=Runtime(tower_attention="stock")) as pruned:
        scores, reports = logits(model, inputs), list(pruned.last)
        ids = generate(model, inputs)
    pixels = iter(inputs["pixel_values"])
    done = 0
    for row, (held, _) in enumerate(ROWS[rows]):
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        mine = reports[done : done + len(held)]
        done += len(held)
        images = [
            (next(pixels)[: report.tiles], size, len(held) == 1, report.stock_tokens)
            for report, size in zip(mine, held, strict=True)
        ]
        found, last, kept = slow_row(eager, real, images, rule, 6)
        for report, own in zip(mine, kept, strict=True):
            assert [set(mask.nonzero()[:, 0].tolist()) for mask in report.selection.keep] == own
        length = len(real) - sum(r.stock_tokens - r.kept_tokens for r in mine)
        ours = scores[row, -1] if side == "left" else scores[row, length - 1]
        torch.testing.assert_close(ours, last, atol=1e-4, rtol=0)
        if side == "left":
            assert ids[row].tolist() == found


def test_the_comparison_can_fail(model):
    inputs = tiny.pictures(ROWS["one"])
    with prune(model, HiPrune(r_max=0.25)) as pruned:
        short = logits(model, inputs)
    assert pruned.last[0].kept_patches < 0.3 * pruned.last[0].stock_tokens
    assert short.shape[1] == inputs["input_ids"].shape[1] - (
        pruned.last[0].stock_tokens - pruned.last[0].kept_tokens
    )


def test_features_alone_are_those_that_a_call_sends(model):
    inputs = tiny.pictures(ROWS["2, 0 and 1 images"])
    given = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}
    with prune(model, HIVTP(r_max=0.25)) as pruned, torch.no_grad():
        found = model.model.get_image_features(**given)
        features = getattr(found, "pooler_output", found)
        assert [len(f) for f in features] == [r.kept_tokens for r in pruned.last]
        assert [r.tiles for r in pruned.last] == [1, 1, 2]
        alone = tiny.pictures(ROWS["one"])
        by_place = model.model.get_image_features(alone["pixel_values"], alone["image_sizes"])
        assert len(getattr(by_place, "pooler_output", by_place)) == 1
        with pytest.raises(UnsupportedModelError, match="vision_feature_layer=-2"):
            model.model.get_image_features(**given, vision_feature_layer=-2)


# What is refused


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_an_image_whose_features_stock_interpolates_is_refused(way, model):
    rows, columns = tiny.shown_of(LARGE)
    assert len(rows) * len(columns) > 1.21 * 9 * PATCHES**2
    inputs = tiny.pictures([([LARGE], 4)])
    with prune(model, Random()), pytest.raises(UnsupportedModelError, match="448 x 448") as caught:
        (model if way == "forward" else model.generate)(**inputs)
    assert "\n" not in str(caught.value)


def test_a_method_that_asks_cls_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="CLS") as caught:
        prune(model, FasterVLM(r_max=0.5))
    assert "\n" not in str(caught.value)
    assert "llava_hvp" not in vars(model)


def test_a_tower_without_cls_whose_first_patch_would_go_is_refused(model):
    own = copy.deepcopy(model)
    own.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="select_strategy='default'"):
        prune(own, HIVTP())


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pixel_values_videos": torch.zeros(1, 2, 3, 112, 112)}, "videos"),
        ({"batch_num_images": torch.tensor([2, 2])}, "batch_num_images"),
        ({"vision_aspect_ratio": "anyres_max_4"}, "vision_aspect_ratio"),
        ({"image_sizes": None}, "image_sizes"),
    ],
)
def test_what_cannot_be_right_is_refused(changed, words, way, model):
    inputs = tiny.pictures(ROWS["2, 0 and 1 images"])
    with prune(model, HIVTP()), pytest.raises(UnsupportedModelError, match=words) as caught:
        (model if way == "forward" else model.generate)(**{**inputs, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_video_alone_is_refused(way, model):
    inputs = tiny.pictures(ROWS["text"])
    inputs["pixel_values_videos"] = torch.zeros(1, 2, 3, 112, 112)
    with prune(model, HIVTP()), pytest.raises(UnsupportedModelError, match="videos"):
        (model if way == "forward" else model.generate)(**inputs)
