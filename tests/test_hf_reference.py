"""transformers' own LLaVA against a slow version: eager maps, loops, rows by themselves."""

import copy
import math

import pytest
import reference
import torch
from hf_models import KINDS, QUESTIONS, needs_release, sized

from llava_hvp import HIVTP, HiPrune, Runtime, Uniform, prune

pytestmark = needs_release

SIDE, PATCHES = 112, 8
GRID = (PATCHES, PATCHES)
BUDGET = {0.5: 32, 0.25: 16, 0.3: 19}


def hivtp(layers, budget):
    def rule(maps):
        return reference.hivtp([maps[layer] for layer in layers], GRID, budget)

    return rule


METHODS = {
    "hivtp": (HIVTP(r_max=0.5), hivtp((7, 8, 9, 10), BUDGET[0.5])),
    "hivtp layers": (HIVTP(r_max=0.5, layers=(3, 20)), hivtp((3, 20), BUDGET[0.5])),
    "hiprune": (
        HiPrune(r_max=0.25),
        lambda maps: reference.hiprune(maps[9], maps[23], GRID, BUDGET[0.25]),
    ),
    "uniform": (
        Uniform(r_max=0.3),
        lambda maps: reference.uniform(PATCHES**2, BUDGET[0.3]),
    ),
}


def maps_of(tower, tile):
    """layer from 1 -> mean over heads and queries of what each patch receives; and the features."""
    output = tower(tile[None], output_attentions=True, output_hidden_states=True)
    maps = {
        layer: reference.float32(attention[0].mean((0, 1))[1:].tolist())
        for layer, attention in enumerate(output.attentions, 1)
    }
    return maps, output.hidden_states[-2][0, 1:]


def tokens_of_image(model, tiles, size, rule, newline="rows"):
    """The embeddings that are sent of one image, one by one; `size` is (height, width)."""
    inner, sent, kept, features = model.model, [], [], []
    for tile in tiles:
        maps, states = maps_of(inner.vision_tower, tile)
        kept.append(reference.kept(rule(maps)))
        features.append([inner.multi_modal_projector(state[None])[0] for state in states])
    sent += [features[0][patch] for patch in range(PATCHES**2) if patch in kept[0]]
    if size is None:
        return sent
    down, across = arrangement(size, len(tiles) - 1)
    rows, columns = unpadded(size, down * PATCHES, across * PATCHES)
    for row in rows:
        line = []
        for column in columns:
            tile = 1 + row // PATCHES * across + column // PATCHES
            patch = row % PATCHES * PATCHES + column % PATCHES
            if patch in kept[tile]:
                line.append(features[tile][patch])
        sent += line
        if line:
            sent.append(inner.image_newline)
    return sent


def arrangement(size, tiles):
    """(down, across) whose picture, fitted in, is largest; of those the one that wastes least."""
    best = None
    for across, down in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)):
        scale = min(across * SIDE / size[1], down * SIDE / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        score = shown, -(across * down * SIDE * SIDE - shown)
        if best is None or score > best[0]:
            best = score, (down, across)
    assert best[1][0] * best[1][1] == tiles
    return best[1]


def unpadded(size, rows, columns):
    """Rows and columns of the mosaic that show the picture."""
    if size[1] / size[0] > columns / rows:
        padding = (rows - math.floor(round(size[0] * (columns / size[1]), 7))) // 2
        return range(padding, rows - padding), range(columns)
    padding = (columns - math.floor(round(size[1] * (rows / size[0]), 7))) // 2
    return range(rows), range(padding, columns - padding)


@pytest.fixture(scope="module")
def eager(hf):
    """A function from a kind to a copy of its model with eager attention."""
    models = {}

    def get(kind):
        if kind not in models:
            models[kind] = copy.deepcopy(hf(kind).model)
            models[kind].set_attn_implementation("eager")
        return models[kind]

    return get


@torch.no_grad()
def slow_row(model, ids, images, rule):
    """Last logits of one row without padding, and the tokens that each image sends."""
    token, embed, embeds, counts = model.config.image_token_id, model.get_input_embeddings(), [], []
    position = 0
    while position < len(ids):
        if ids[position] != token:
            embeds.append(embed(ids[position]))
            position += 1
            continue
        tiles, size, stock = images.pop(0)
        sent = tokens_of_image(model, tiles, size, rule)
        counts.append(len(sent))
        embeds += sent
        position += stock
    assert not images
    sequence = torch.stack(embeds)[None]
    positions = torch.arange(sequence.shape[1])[None]
    hidden = model.model.language_model(inputs_embeds=sequence, position_ids=positions)[0]
    return model.lm_head(hidden[0, -1]), counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_ragged_next_batch(kind, name, side, hf, eager, photos):
    compare(hf(kind), eager(kind), name, side, photos)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_a_ragged_batch(name, side, hf, eager, photos):
    compare(hf(KINDS[0]), eager(KINDS[0]), name, side, photos)


def compare(bundle, model, name, side, photos):
    """Rows of 1, 2 and no images, in one batch, and each by itself in the slow version."""
    method, rule = METHODS[name]
    pictures = sized(photos)
    texts = [
        f"USER: <image>\n{QUESTIONS[1]} ASSISTANT:",
        f"USER: Look <image> and <image>\n{QUESTIONS[0]} ASSISTANT:",
        f"USER: {QUESTIONS[2]} ASSISTANT:",
    ]
    inputs = bundle.inputs(texts, pictures, side)
    with prune(bundle.model, method, runtime=Runtime(tower_attention="stock")) as pruned:
        logits = bundle.logits(inputs)
        reports = list(pruned.last)
    sizes = inputs["image_sizes"].tolist() if bundle.is_next else [None] * 3
    images = []
    for pixels, size, report in zip(inputs["pixel_values"], sizes, reports, strict=True):
        tiles = pixels[: report.tiles] if bundle.is_next else pixels[None]
        images.append((tiles, size, report.stock_tokens))
    counts, lengths, last = [], [], []
    for row, held in enumerate(((0, 1), (1, 3), (3, 3))):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        mine = images[slice(*held)]
        expected, sent = slow_row(model, ids, list(mine), rule)
        counts += sent
        lengths.append(len(ids) + sum(sent) - sum(stock for _, _, stock in mine))
        last.append(expected)
    assert [report.kept_tokens for report in reports] == counts
    assert logits.shape[1] == max(lengths)
    for row, (expected, length) in enumerate(zip(last, lengths, strict=True)):
        found = logits[row, -1] if side == "left" else logits[row, length - 1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
