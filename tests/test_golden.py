"""What the released codes keep, index for index; and LLaVA's own order and counts of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from llava_hvp import (
    HIVTP,
    HiPrune,
    VisionContext,
    VisionMethod,
    get_method,
    list_methods,
)
from llava_hvp.pruning.layout import NEWLINE

GOLDEN = Path(__file__).parent / "golden"
GRID, SIDE, PATCHES = (24, 24), 336, 576
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-v1.6


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def case_id(case):
    parts = [f"seed{case['seed']}"]
    if "image_size" in case:
        parts.append("{}x{}".format(*case["image_size"]))
    if "budget" in case:
        parts.append(str(case["budget"]))
    return "-".join(parts)


def several_tiles(case):
    return "image_size" in case


def draws(case, count):
    """`count` score tensors of (tiles, 576), as golden/README.md draws them."""
    generator = np.random.default_rng(case["seed"])
    shape = (case.get("tiles", 1), PATCHES)
    return [torch.from_numpy(generator.random(shape, dtype=np.float32)) for _ in range(count)]


def hiprune_selection(case):
    middle, deep = draws(case, 2)
    method = HiPrune(variant="code", num_tokens=case["budget"], alpha=case["alpha"])
    return method.select(VisionContext(GRID, {9: middle, 23: deep}, depth=24, feature_layer=23))


def kept(keep):
    """The kept patches of each tile, in raster order."""
    return [row.nonzero().flatten().tolist() for row in keep]


def kept_by_tile(case):
    """Golden patches of each tile as sets; with one tile, `kept` is patch indices already."""
    tiles = [set() for _ in range(case["tiles"])]
    for token in case["kept"]:
        tiles[token // PATCHES].add(token % PATCHES)
    return tiles


each_hivtp = pytest.mark.parametrize("case", cases("hivtp"), ids=case_id)
each_hiprune = pytest.mark.parametrize("case", cases("hiprune"), ids=case_id)


def test_the_golden_files_hold_single_and_several_tiles():
    assert len(cases("hivtp")) == 8
    by_kind = [several_tiles(case) for case in cases("hiprune")]
    assert (by_kind.count(False), by_kind.count(True)) == (21, 14)


@each_hivtp
def test_hivtp_keeps_what_the_released_code_keeps(case):
    layers = tuple(case["layers"])
    received = dict(zip(layers, draws(case, 3), strict=True))
    method = HIVTP(r_max=case["r_max"], layers=(7, 8, 9))
    selection = method.select(VisionContext(GRID, received, depth=24, feature_layer=23))
    assert layers == (7, 8, 9)
    assert kept(selection.keep) == [case["kept"]]


@each_hiprune
def test_hiprune_keeps_what_the_released_code_keeps(case):
    found = kept(hiprune_selection(case).keep)
    if several_tiles(case):
        assert [set(tile) for tile in found] == kept_by_tile(case)
    else:
        assert found == [case["kept"]]


@each_hivtp
def test_the_slow_hivtp_keeps_what_the_released_code_keeps(case):
    layers = [scores[0].tolist() for scores in draws(case, 3)]
    roles = reference.hivtp(layers, GRID, reference.p_max(PATCHES, r_max=case["r_max"]))
    assert sorted(reference.kept(roles)) == case["kept"]


@each_hiprune
def test_the_slow_hiprune_keeps_what_the_released_code_keeps(case):
    shares = reference.shares(case["budget"], [case["tiles"]])
    tiles = zip(*(scores.tolist() for scores in draws(case, 2)), shares, strict=True)
    roles = [
        reference.hiprune(middle, deep, GRID, share, alpha=case["alpha"], variant="code")
        for middle, deep, share in tiles
    ]
    assert [reference.kept(tile) for tile in roles] == kept_by_tile(case)


# Packed as LLaVA packs: these need LLaVA itself


@pytest.fixture(scope="module")
def tiling():
    """LLaVA's tiling, imported late: the golden selections themselves need no host."""
    pytest.importorskip("llava")
    from llava_hvp.hosts.llava import tiling

    return tiling


def tiling_of(tiling):
    return tiling.TilingConfig(
        merge_type="spatial_unpad",
        aspect_ratio="anyres",
        pinpoints=str(PINPOINTS),
        grid=GRID,
        image_side=SIDE,
    )


def tiles_of(size):
    """Tiles that LLaVA cuts an image into, the base image included."""
    from llava.mm_utils import get_anyres_image_grid_shape

    across, down = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return 1 + across * down


each_size = pytest.mark.parametrize("size", reference.STOCK_TOKENS, ids="{0[0]}x{0[1]}".format)


@pytest.mark.parametrize("case", [*filter(several_tiles, cases("hiprune"))], ids=case_id)
def test_tokens_are_packed_in_the_order_of_the_released_code(tiling, case):
    size, tiles = tuple(case["image_size"]), case["tiles"]
    place = tiling.layout(tiling_of(tiling), tiles, size, "spatial")
    assert tiles == tiles_of(size)
    assert place.kept(hiprune_selection(case).keep.flatten(), "rows").tolist() == case["kept"]


@each_size
def test_stock_sends_as_many_tokens_as_llava_does(tiling, size):
    place = tiling.layout(tiling_of(tiling), tiles_of(size), size, "stock")
    everything = torch.ones(tiles_of(size) * PATCHES, dtype=torch.bool)
    assert place.stock_tokens == reference.STOCK_TOKENS[size]
    assert len(place.kept(everything, "rows")) == reference.STOCK_TOKENS[size]
    assert len(place.kept(everything, "all")) == reference.STOCK_TOKENS[size]


@each_size
def test_without_unpad_and_newline_every_patch_is_a_token(tiling, size):
    tiles = tiles_of(size)
    place = tiling.layout(tiling_of(tiling), tiles, size, "spatial")
    everything = torch.ones(tiles * PATCHES, dtype=torch.bool)
    assert place.stock_tokens == tiles * PATCHES
    assert sorted(place.kept(everything, "rows").tolist()) == list(range(tiles * PATCHES))


@pytest.mark.parametrize("r_max", [0.75, 0.5, 0.4, 0.25, 0.111])
@pytest.mark.parametrize("name", list_methods(VisionMethod))
def test_pruned_images_stay_within_their_budget_and_below_stock(tiling, name, r_max):
    method = get_method(name, r_max=r_max)
    needs = method.needs(24, 23)
    budget = reference.p_max(PATCHES, r_max=r_max)
    for size, stock_tokens in reference.STOCK_TOKENS.items():
        tiles = tiles_of(size)
        generator = torch.Generator().manual_seed(tiles * size[0] + size[1])
        context = VisionContext(
            GRID,
            {
                layer: torch.rand(tiles, PATCHES, generator=generator)
                for layer in needs.received_attention
            },
            depth=24,
            feature_layer=23,
            cls_attention={
                layer: torch.rand(tiles, PATCHES, generator=generator)
                for layer in needs.cls_attention
            },
            features=torch.rand(tiles, PATCHES, 4) if needs.features else None,
            relevance=torch.rand(tiles, PATCHES, generator=generator),
            tiles=(tiles,),
            keys={n: torch.randn(tiles, 1 + PATCHES, 8, generator=generator) for n in needs.keys},
            queries={
                n: torch.randn(tiles, 1 + PATCHES, 8, generator=generator) for n in needs.queries
            },
            heads=2,
            projected=torch.rand(tiles, PATCHES, 4) if needs.projected else None,
            words=(torch.rand(3, 4),) if needs.words else None,
            padding=torch.zeros(tiles, PATCHES, dtype=torch.bool) if needs.padding else None,
            mosaics=((1, tiles - 1),) if needs.mosaics else None,
        )
        keep = method.select(context).keep.flatten()
        most = method.budget(PATCHES, tiles) if method.of_image else budget * tiles
        assert keep.sum() <= most
        for merge, limit in (("stock", stock_tokens), ("spatial", tiles * PATCHES)):
            place = tiling.layout(tiling_of(tiling), tiles, size, merge)
            for newline in ("rows", "all", "none"):
                tokens = place.kept(keep, newline)
                patches = tokens[tokens != NEWLINE]
                assert len(tokens) <= limit, f"{size} {merge} {newline}"
                assert len(patches) <= most
                assert keep[patches].all()
                assert len(patches.unique()) == len(patches)
