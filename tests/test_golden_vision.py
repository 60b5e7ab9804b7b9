"""What the official codes of six methods keep, index for index, in the order that is sent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_vision import cosines

from llava_hvp import Runtime, Uniform, VisionContext, get_method, prune
from llava_hvp.hosts.llava.tiling import TilingConfig, arrangement, layout
from llava_hvp.methods import greedy
from llava_hvp.pruning.layout import NEWLINE
from llava_hvp.pruning.packing import tokens_of

GOLDEN = Path(__file__).parent / "golden"
DEPTH, SELECT = 24, 23
# The sub-images of the pinpoint that the official code takes, (down, across).
MOSAICS = {(640, 480): (2, 2), (1000, 300): (1, 3), (300, 1000): (3, 1)}


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def each(name):
    ids = [f"seed{case['seed']}" for case in cases(name)]
    return pytest.mark.parametrize("case", cases(name), ids=ids)


def drawn(case):
    """features, attention by head, projected, embeds, text: as golden/README.md draws them."""
    g = np.random.default_rng(case["seed"])
    tiles, patches, clusters = case["tiles"], case["patches"], case.get("clusters", 0)
    found, label = {}, None

    def normal(*shape):
        return g.standard_normal(shape, dtype=np.float32)

    def tokens(dim):
        nonlocal label
        values = normal(tiles, patches, dim)
        if not clusters:
            return values
        centers = normal(tiles, clusters, dim)
        if label is None:
            label = g.integers(0, clusters, (tiles, patches))
        return centers[np.arange(tiles)[:, None], label] + np.float32(case["noise"]) * values

    if case.get("dim"):
        found["features"] = tokens(case["dim"])
    if case.get("heads"):
        u = g.random((tiles, case["heads"], patches), dtype=np.float32)
        found["attention"] = u * u * u if case.get("power") == 3 else u
    if case.get("projected_dim"):
        found["projected"] = tokens(case["projected_dim"])
    if case.get("embed_dim"):
        found["embeds"] = normal(tiles, patches, case["embed_dim"])
    if case.get("texts"):
        text = normal(case["texts"], case["text_dim"])
        if case.get("text_scaled"):
            text = text * np.arange(1, case["texts"] + 1, dtype=np.float32)[:, None]
        found["text"] = text
    return found


def context_of(case):
    """The context that the official code saw in this case."""
    drawings, patches = drawn(case), case["patches"]
    fields = {
        name: torch.from_numpy(drawings[name])
        for name in ("features", "projected")
        if name in drawings
    }
    if "attention" in drawings:
        fields["cls_attention"] = {SELECT: torch.from_numpy(drawings["attention"]).mean(1)}
    if "embeds" in drawings:  # text segments: the mean of their cosines
        relevance = cosines(drawings["embeds"], drawings["text"]).mean(-1)
        fields["relevance"] = torch.from_numpy(relevance)
    elif "text" in drawings:
        fields["words"] = (torch.from_numpy(drawings["text"]),)
    if "padding" in case:
        fields["padding"] = torch.isin(torch.arange(patches), torch.tensor(case["padding"]))[None]
    side = round(patches**0.5)
    return VisionContext(
        (side, side), depth=DEPTH, feature_layer=SELECT, tiles=(case["tiles"],), **fields
    )


def kept(keep):
    return [row.nonzero().flatten().tolist() for row in keep]


def tiling_of(side):
    """LLaVA-v1.6's, on tiles of so many patches a side."""
    pixels = 14 * side
    pinpoints = [[pixels * x, pixels * y] for x, y in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return TilingConfig("spatial_unpad", "anyres", str(pinpoints), (side, side), pixels)


@pytest.fixture(scope="module")
def two_by_two(loaded):
    """How a LLaVA-NeXT tiles that is pruned with `tiling="672"`, as two of the official codes."""
    with prune(loaded("llava-next-336").model, Uniform(), runtime=Runtime(tiling="672")) as pruned:
        return pruned.host_model.tiling()


def assert_keeps_the_golden(case, method, tiling=None):
    context = context_of(case)
    selection = method.select(context)
    keep = selection.keep
    assert keep.sum(-1).tolist() == [case.get("budget", keep[0].sum())] * case["tiles"]
    if "kept" in case:
        assert kept(keep) == case["kept"]
        return
    size, mosaic = tuple(case["image_size"]), (2, 2)
    if tiling is None:
        tiling, mosaic = tiling_of(context.grid[0]), MOSAICS[tuple(case["image_size"])]
    assert arrangement(tiling, case["tiles"], size) == mosaic
    place = layout(tiling, case["tiles"], size, "spatial")
    assert tokens_of(place, selection, method, "rows").tolist() == case["packed"]


@each("fastervlm")
def test_fastervlm_keeps_what_the_official_code_keeps(case):
    method = get_method("fastervlm", num_tokens=case["budget"] * case["tiles"])
    assert_keeps_the_golden(case, method)


@each("vispruner")
def test_vispruner_keeps_what_the_official_code_keeps(case, two_by_two):
    method = get_method(
        "vispruner",
        num_tokens=case["budget"] * case["tiles"],
        important_ratio=case["important_ratio"],
    )
    assert_keeps_the_golden(case, method, two_by_two)


@each("cdpruner")
def test_cdpruner_keeps_what_the_official_code_keeps(case, two_by_two):
    method = get_method("cdpruner", num_tokens=case["budget"] * case["tiles"])
    assert_keeps_the_golden(case, method, two_by_two)


@each("scope")
def test_scope_keeps_what_the_official_code_keeps(case):
    alpha, total = case.get("alpha", 1.0), case["budget"] * case["tiles"]
    assert_keeps_the_golden(case, get_method("scope", num_tokens=total, alpha=alpha))
    context = context_of(case)
    similarity, weight = greedy.cosines(context.features), context.cls_attention[SELECT] ** alpha
    order = greedy.covering(similarity, case["budget"], weight)
    assert order.tolist() == case["order"]


@each("mmtok")
def test_mmtok_keeps_what_the_official_code_keeps(case):
    method = get_method("mmtok", num_tokens=case["budget"] * case["tiles"])
    assert_keeps_the_golden(case, method)


def stock_sequence(case):
    """The image's tokens as LLaVA packs them, newlines included."""
    tiles, patches = case["tiles"], case["patches"]
    place = layout(tiling_of(round(patches**0.5)), tiles, tuple(case["image_size"]), "stock")
    return place.kept(torch.ones(tiles * patches, dtype=torch.bool), "all").tolist()


@pytest.mark.parametrize(
    "case", [c for c in cases("divprune") if "kept" in c], ids=lambda case: f"seed{case['seed']}"
)
def test_divprune_keeps_what_the_official_code_keeps(case):
    context, count = context_of(case), len(case["order"])
    assert count == round(case["ratio"] * case["patches"])
    for options in ({"num_tokens": count}, {"num_tokens": count, "scope": "image"}):
        assert kept(get_method("divprune", **options).select(context).keep) == case["kept"]
    order = greedy.farthest_first(greedy.cosines(context.projected), count)
    assert order[0].tolist() == case["order"]


@pytest.mark.parametrize(
    "case", [c for c in cases("divprune") if "packed" in c], ids=lambda case: f"seed{case['seed']}"
)
def test_divprunes_rule_chooses_from_a_packed_image_what_the_official_code_does(case):
    # There the newlines are candidates, which `scope="image"` does not offer: the rule alone.
    sequence = stock_sequence(case)
    newline = np.random.default_rng(case["seed"] + 10**6)
    newline = newline.standard_normal(case["projected_dim"], dtype=np.float32)
    tokens = drawn(case)["projected"].reshape(-1, case["projected_dim"])
    tokens = np.stack([newline if token == NEWLINE else tokens[token] for token in sequence])
    count = round(case["ratio"] * len(sequence))
    order = greedy.farthest_first(greedy.cosines(torch.from_numpy(tokens)[None]), count)
    assert order[0].tolist() == case["order"]
    assert [sequence[place] for place in sorted(case["order"])] == case["packed"]


def test_the_golden_files_hold_all_cases():
    counts = {"cdpruner": 13, "divprune": 13, "fastervlm": 13, "mmtok": 12, "scope": 12}
    assert {name: len(cases(name)) for name in counts} == counts
    assert len(cases("vispruner")) == 14
