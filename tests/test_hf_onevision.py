"""LLaVA-OneVision of transformers: a SigLIP tower without CLS, and several images a row."""

import copy
import dataclasses

import hf_families as tiny
import pytest
import reference
import torch
from hf_families import DEPTH, PATCHES, assert_keeping_all_is_stock, generate, logits
from hf_models import needs_release

from llava_hvp import (
    HIVTP,
    FasterVLM,
    HiPrune,
    Mix,
    Runtime,
    Uniform,
    VisionContext,
    VisionMethod,
    get_method,
    list_methods,
    prune,
)
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.pruning.shrunk import Shrunk
from llava_hvp.pruning.shrunk import select as shrunk_select

pytestmark = needs_release

GRID = (PATCHES, PATCHES)
WIDE, TALL, SMALL = (150, 400), (330, 130), (100, 100)
LARGE, BROAD = (448, 448), (400, 448)  # 16 tiles: stock interpolates their features
ROWS = {
    "one": [([WIDE], 5)],
    "ragged": [([WIDE], 5), ([TALL], 9), ([SMALL], 2)],
    "2, 0 and 1 images": [([WIDE, TALL], 5), ([], 6), ([SMALL], 3)],
    "large": [([LARGE], 5)],
    "large and small": [([BROAD], 5), ([SMALL], 3), ([LARGE], 2)],
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


def hivtp(maps, grid, budget):
    layers = reference.default_layers((7, 8, 9, 10), DEPTH, DEPTH)
    return reference.hivtp([maps[layer] for layer in layers], grid, budget)


def hiprune(maps, grid, budget):
    (middle,) = reference.default_layers((9,), DEPTH, DEPTH)
    return reference.hiprune(maps[middle], maps[DEPTH], grid, budget)


def uniform(maps, grid, budget):
    return reference.uniform(grid[0] * grid[1], budget)


METHODS = {
    "hivtp": (HIVTP(r_max=0.5), hivtp),
    "hiprune": (HiPrune(r_max=0.25), hiprune),
    "uniform": (Uniform(r_max=0.3), uniform),
}


def patches_of(size):
    """Of each row of a picture's mosaic, the (tile, patch) that stock sends."""
    across = tiny.arrangement(size)[1]
    rows, columns = tiny.shown_of(size)
    return [
        [
            (
                1 + row // PATCHES * across + column // PATCHES,
                row % PATCHES * PATCHES + column % PATCHES,
            )
            for column in columns
        ]
        for row in rows
    ]


def shrunk(table, grid):
    """Rows of values, interpolated to a grid, one after the other."""

    def places(many, few):
        for n in range(few):
            at = max(0.0, (n + 0.5) * many / few - 0.5)
            yield int(at), min(int(at) + 1, many - 1), at - int(at)

    found = []
    for top, bottom, down in places(len(table), grid[0]):
        for left, right, along in places(len(table[0]), grid[1]):
            above = table[top][left] * (1 - along) + table[top][right] * along
            below = table[bottom][left] * (1 - along) + table[bottom][right] * along
            found.append(above * (1 - down) + below * down)
    return found


@torch.no_grad()
def slow_image(model, tiles, size, cut, rule, r_max):
    """The embeddings that are sent of one image, and what is kept of each tile.

    Of a shrunk mosaic, behind the base tile, which of its tokens are kept.
    """
    inner, kept, features, scores = model.model, [], [], []
    for tile in tiles:
        seen = inner.vision_tower(tile[None], output_attentions=True, output_hidden_states=True)
        maps = {
            layer: reference.float32(attention[0].mean((0, 1)).tolist())
            for layer, attention in enumerate(seen.attentions, 1)
        }
        scores.append(maps)
        kept.append(reference.kept(rule(maps, GRID, round(r_max * PATCHES**2))))
        states = seen.hidden_states[-1][0]
        features.append([inner.multi_modal_projector(state[None])[0] for state in states])
    sent = [features[0][patch] for patch in sorted(kept[0])]
    if not cut:
        return [*sent, inner.image_newline], kept
    table, grid = patches_of(size), tiny.sent_of(size)
    tokens = [[features[tile][patch] for tile, patch in row] for row in table]
    stays = [[patch in kept[tile] for tile, patch in row] for row in table]
    if grid != (len(table), len(table[0])):
        maps = {
            layer: shrunk([[scores[t][layer][patch] for t, patch in row] for row in table], grid)
            for layer in scores[0]
        }
        kept = [kept[0], reference.kept(rule(maps, grid, round(r_max * grid[0] * grid[1])))]
        flat = shrunk(tokens, grid)
        lines = [slice(row * grid[1], (row + 1) * grid[1]) for row in range(grid[0])]
        tokens = [flat[line] for line in lines]
        stays = [[n in kept[1] for n in range(line.start, line.stop)] for line in lines]
    for row, stay in zip(tokens, stays, strict=True):
        line = [token for token, stays_here in zip(row, stay, strict=True) if stays_here]
        sent += [*line, inner.image_newline] if line else []
    return sent, kept


@torch.no_grad()
def slow_row(model, ids, images, rule, r_max, tokens):
    """Greedy ids of one row by itself without a cache, its last logits, and what was kept."""
    parts, kept, position = [], [], 0
    while position < len(ids):
        if ids[position] != tiny.IMAGE:
            parts.append(model.get_input_embeddings()(ids[position]))
            position += 1
            continue
        tiles, size, cut, stock = images.pop(0)
        sent, own = slow_image(model, tiles, size, cut, rule, r_max)
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
@pytest.mark.parametrize("rows", ["ragged", "2, 0 and 1 images", "large and small"])
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
        found, last, kept = slow_row(eager, real, images, rule, method.r_max, 6)
        for report, own in zip(mine, kept, strict=True):
            masks = report.selection.keep
            if report.mosaic is not None:
                masks = [masks[0], report.mosaic.keep[0]]
            assert [set(mask.nonzero()[:, 0].tolist()) for mask in masks] == own
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


# Pictures so large that stock shrinks their mosaic


@pytest.fixture(scope="module")
def methods():
    """Of all that a tower without CLS can be chosen on by, names, less those that read a prompt."""
    return [
        name
        for name in list_methods(VisionMethod)
        if not get_method(name).needs_cls
        and not get_method(name).reads(DEPTH, DEPTH).cls_attention
        and name not in ("hiprune++", "cdpruner", "mmtok")
    ]


def test_the_budget_is_of_the_tokens_that_are_sent(methods, model):
    inputs = tiny.pictures([([BROAD], 5), ([SMALL], 2)])
    rows, columns = tiny.sent_of(BROAD)
    assert rows * columns < 0.7 * sum(len(row) for row in patches_of(BROAD))
    assert len(methods) > 4
    for name in methods:
        for budget in ({"r_max": 0.25}, {"num_tokens": 170}):
            with prune(model, get_method(name, **budget)) as pruned:
                logits(model, inputs)
                large, small = pruned.last
            base, most = (16, round(rows * columns / 4)) if "r_max" in budget else (10, 160)
            kept = int(large.selection.keep[0].sum()), int(large.mosaic.keep.sum())
            assert 0 < kept[0] <= base, name
            assert 0.8 * most < kept[1] <= most, (name, kept)
            assert large.kept_tokens <= sum(kept) + rows
            assert small.mosaic is None
            # By patches: a token covers as large a share of either.
            share = large.sent[1:].sum() / large.stock[1:].sum()
            assert abs(float(share) - kept[1] / (rows * columns)) < 0.1, name


def test_a_large_picture_that_comes_again_is_chosen_on_once(model):
    inputs = tiny.pictures(ROWS["large"])
    with prune(model, HIVTP(r_max=0.25)) as pruned, torch.no_grad():
        pruned.reuse = True
        first, before = model(**inputs).logits, pruned.last[0]
        again, after = model(**inputs).logits, pruned.last[0]
    assert (before.reused, after.reused) == (False, True)
    assert torch.equal(first, again)


def test_a_token_is_drawn_at_the_patches_whose_centre_it_covers(model):
    with prune(model, HIVTP(r_max=0.25)) as pruned:
        logits(model, tiny.pictures(ROWS["large"]))
    (report,) = pruned.last
    grid, table = tiny.sent_of(LARGE), patches_of(LARGE)
    for row, line in enumerate(table):
        for column, (tile, patch) in enumerate(line):
            token = [
                int((at + 0.5) * few / many)
                for at, few, many in zip((row, column), grid, (len(table), len(line)), strict=True)
            ]
            kept = report.mosaic.keep[0, token[0] * grid[1] + token[1]]
            assert report.selection.keep[tile, patch] == kept


@pytest.mark.parametrize("name", ["mmtok", "cdpruner"])
def test_methods_that_read_the_prompt_choose_there_too(name):
    random = torch.Generator().manual_seed(0)
    tiles, patches, grid = 5, 16, (5, 6)  # of 2 x 2 tiles of 4 x 4
    values = torch.rand(tiles, patches, 8, generator=random)
    context = VisionContext(
        grid=(4, 4),
        features=values,
        projected=values,
        relevance=values[..., 0],
        words=(values[0, :3],),
        padding=torch.zeros(tiles, patches, dtype=torch.bool),
        tiles=(tiles,),
    )
    whole = torch.arange(patches, tiles * patches).view(8, 8)
    means = torch.rand(30, 64, generator=random).softmax(1)
    small = Shrunk((112, 112), grid, whole, lambda v: means @ v[1:].flatten(0, 1))
    method = get_method(name, r_max=0.5)
    chosen, (mosaic,) = shrunk_select(method, context, [small])
    tokens = means @ values[1:].flatten(0, 1)
    alone = dataclasses.replace(
        context,
        grid=grid,
        features=tokens[None],
        projected=tokens[None],
        relevance=tokens[None, :, 0],
        padding=torch.zeros(1, 30, dtype=torch.bool),
        tiles=(1,),
    )
    assert torch.equal(mosaic.keep, method.select(alone).keep)
    base = context.rows(torch.tensor([0]), (1,))
    assert torch.equal(chosen.keep[:1], method.select(base).keep)
    assert not chosen.keep[1:].any()
    assert 0 < int(mosaic.keep.sum()) <= 15


class Merging(HiPrune):
    """Merges nothing, by weights of nothing. Not registered: no own name."""

    def choose(self, context, budget):
        kept = super().choose(context, budget)
        added = torch.zeros(*kept.keep.shape, context.patches)
        return dataclasses.replace(kept, mix=Mix(added))


def test_a_method_that_merges_is_refused_there(model):
    with prune(model, Merging(r_max=0.5)):
        logits(model, tiny.pictures(ROWS["one"]))
        with pytest.raises(UnsupportedModelError, match=r"merges tokens.*smaller picture"):
            logits(model, tiny.pictures(ROWS["large and small"]))


# What is refused


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
