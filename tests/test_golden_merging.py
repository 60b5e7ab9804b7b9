"""What the released codes of VisionZip, PruMerge(+), HiRED (and HydraInfer's FoPru) keep and merge.

Index for index, in the order in which the language model gets the tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_hvp import FoPru, HiRED, PruMerge, PruMergePlus, VisionContext, VisionZip
from llava_hvp.hosts.llava.tiling import TilingConfig, arrangement, layout
from llava_hvp.pruning.layout import EXTRA, NEWLINE
from llava_hvp.pruning.packing import tokens_of

GOLDEN = Path(__file__).parent / "golden"
DEPTH, SELECT = 24, 23
# (width, height) -> (down, across) of the tiles that LLaVA-v1.6 cuts
MOSAICS = {
    (640, 480): (2, 2),
    (480, 640): (2, 2),
    (640, 427): (2, 2),
    (672, 672): (2, 2),
    (1000, 300): (1, 3),
    (300, 1000): (3, 1),
    (800, 400): (1, 2),
    (400, 800): (2, 1),
    (336, 336): (2, 1),
}


def each(name):
    cases = json.loads((GOLDEN / f"{name}.json").read_text())
    return pytest.mark.parametrize("case", cases, ids=[f"seed{case['seed']}" for case in cases])


class Case:
    """A case's draws in order, and the context that they are put into."""

    def __init__(self, case):
        self.grid, self.tiles = tuple(case["grid"]), case["tiles"]
        self.patches = self.grid[0] * self.grid[1]
        self.tokens = 1 + self.patches
        self.generator = np.random.default_rng(case["seed"])
        self.size = tuple(case["image_size"]) if "image_size" in case else None

    @property
    def mosaic(self):
        return MOSAICS[self.size] if self.size else None

    def draw(self, *shape):
        return torch.from_numpy(self.generator.random(shape, dtype=np.float32))

    def context(self, **fields):
        images = (self.tiles,) if self.size else (1,) * self.tiles
        return VisionContext(self.grid, depth=DEPTH, feature_layer=SELECT, tiles=images, **fields)


# Packing


def sequence(method, selection, case, merge="stock", newline="rows"):
    """Tokens in order: `tile * N + patch`, or -(tile + 1) for the one that stands at no patch."""
    merge_type = "spatial_unpad" if case.size else "flat"
    side, tiles = 14 * case.grid[0], case.tiles
    # The pinpoints of LLaVA-v1.6, of tiles of this side.
    pinpoints = [[side * x, side * y] for x, y in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    tiling = TilingConfig(merge_type, "anyres", str(pinpoints), case.grid, side)
    assert arrangement(tiling, tiles, case.size) == case.mosaic
    place = layout(tiling, tiles, case.size, merge)
    tokens = tokens_of(place, selection, method, newline)
    assert NEWLINE not in tokens
    return torch.where(tokens <= EXTRA, tokens - EXTRA - 1, tokens).tolist()


def features_of(tokens, selection, states, patches):
    """The rows that are sent for a sequence of tokens."""
    at_patches, extra = selection.mix.apply(states)
    return torch.stack(
        [extra[-t - 1] if t < 0 else at_patches[t // patches, t % patches] for t in tokens]
    )


# The methods


@each("visionzip")
def test_visionzip_sends_what_the_released_code_sends(case):
    drawn = Case(case)
    cls = drawn.draw(drawn.tiles, drawn.patches)
    keys = drawn.draw(drawn.tiles, drawn.tokens, 16) - 0.5
    states = drawn.draw(drawn.tiles, drawn.tokens, 8) - 0.5
    a_tile = case["dominant"] + case["contextual"]
    method = VisionZip(
        num_tokens=a_tile * (drawn.tiles if drawn.size else 1),
        contextual=case["contextual"],
    )
    if a_tile > 3:  # the smallest case is not one of the authors' ratio
        assert VisionZip().sizes(a_tile) == (case["dominant"] - 1, case["contextual"])
    context = drawn.context(cls_attention={SELECT: cls}, keys={SELECT: keys}, heads=case["heads"])
    selection = method.select(context)
    tokens = sequence(method, selection, drawn, merge="spatial")
    assert tokens == case["sequence"]
    sent = features_of(tokens, selection, states, drawn.patches)
    merged = torch.tensor([token in set(case["merged"]) for token in tokens])
    assert [token for token in tokens if token in set(case["merged"])] == case["merged"]
    assert selection.roles["contextual"].sum() == len(case["merged"])
    assert torch.allclose(sent[merged], torch.tensor(case["features"]), atol=1e-5)
    assert torch.allclose(sent.sum(0), torch.tensor(case["sum"]), atol=1e-3)
    for token, row in zip(tokens, sent, strict=True):  # all others are their own states, to the bit
        if token not in set(case["merged"]):
            tile, state = (-token - 1, 0) if token < 0 else divmod(token, drawn.patches)
            assert torch.equal(row, states[tile, state + (token >= 0)])


@each("prumerge")
def test_prumerge_sends_what_the_released_code_sends(case):
    drawn = Case(case)
    query = np.float32(case["scale"]) * (drawn.draw(drawn.tiles, 8) - 0.5)
    keys = drawn.draw(drawn.tiles, drawn.tokens, 8) - 0.5
    states = drawn.draw(drawn.tiles, drawn.tokens, 8) - 0.5
    kind = PruMergePlus if case["plus"] else PruMerge
    if case["ratio"] is None:
        method = kind(adaptive=True)
    else:
        method = kind(num_tokens=int(drawn.patches * case["ratio"]) + 1)
    queries = torch.zeros_like(keys)
    queries[:, 0] = query  # no other is looked at
    context = drawn.context(keys={24: keys}, queries={24: queries})
    selection = method.select(context)
    assert selection.roles["important"].sum(1).tolist() == case["important"]
    tokens = sequence(method, selection, drawn)
    assert tokens == case["sequence"]
    sent = features_of(tokens, selection, states, drawn.patches)
    assert torch.allclose(sent, torch.tensor(case["features"]), atol=1e-5)


@each("hired")
def test_hired_keeps_what_the_released_code_keeps(case):
    drawn = Case(case)
    top, bottom = (drawn.draw(drawn.tiles, drawn.patches) for _ in range(2))
    coarse = drawn.draw(4, 4).repeat_interleave(drawn.grid[0] // 4, 0)
    top[0] *= coarse.repeat_interleave(drawn.grid[1] // 4, 1).flatten()
    method = HiRED(r_max=case["rate"], alpha=case["alpha"])
    context = drawn.context(cls_attention={1: top, SELECT: bottom}, mosaics=(drawn.mosaic,))
    selection = method.select(context)
    kept = [tile.nonzero().flatten().tolist() for tile in selection.keep]
    assert kept == case["kept"]
    assert "sequence" in case or drawn.mosaic != (2, 2)
    if "sequence" in case:
        assert sequence(method, selection, drawn, newline="none") == case["sequence"]


def kept_by_fopru(case, **fields):
    options = {key: case[key] for key in ("strategy", "count")}
    method = FoPru(
        strategy=options["strategy"],
        num_tokens=options["count"],
        attention="softmax" if "cls_attention" in fields else "logits",
    )
    keep = method.select(Case(case).context(**fields)).keep
    return [tile.nonzero().flatten().tolist() for tile in keep]


@each("fopru")
def test_fopru_keeps_what_hydrainfers_function_keeps_on_the_softmax(case):
    drawn = Case(case)
    attention = drawn.draw(drawn.tiles, 2, drawn.tokens, drawn.tokens)
    attention *= drawn.draw(drawn.tiles, 1, 1, drawn.tokens)
    attention /= attention.sum(-1, keepdim=True)
    received = {SELECT: attention.mean((1, 2))[:, 1:]}
    cls = {SELECT: attention[:, :, 0, 1:].mean(1)}
    assert kept_by_fopru(case, received_attention=received, cls_attention=cls) == case["kept"]


@each("fopru_logits")
def test_fopru_keeps_what_hydrainfers_function_keeps_on_logits(case):
    drawn = Case(case)
    queries = drawn.draw(drawn.tiles, drawn.tokens, 16) - 0.5
    keys = drawn.draw(drawn.tiles, drawn.tokens, 16) - 0.5
    lean = drawn.draw(2, 16)
    queries += np.float32(case["lean"][0]) * lean[0]
    keys += np.float32(case["lean"][1]) * lean[1]
    found = kept_by_fopru(case, keys={SELECT: keys}, queries={SELECT: queries}, heads=2)
    assert found == case["kept"]
