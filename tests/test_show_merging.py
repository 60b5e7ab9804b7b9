"""What a token took in: read from the weights here by loops, and found again in the pictures."""

import base64
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from PIL import Image

from llava_hvp import HIVTP, HiPrune, PruMerge, PruMergePlus, VisionZip, prune
from llava_hvp.cli import main
from llava_hvp.methods.base import Mix, Selection
from llava_hvp.pruning.report import ImageReport
from llava_hvp.show.colours import REGIONS
from llava_hvp.show.frame import Panel
from llava_hvp.show.merging import NOWHERE, merging_of
from llava_hvp.show.regions import region_colours

METHODS = [
    VisionZip(r_max=0.25),
    VisionZip(num_tokens=20, contextual=0),
    PruMerge(r_max=0.25),
    PruMergePlus(r_max=0.5),
]


def report_of(sent, added, *, extra=None, mixed=None, grid=(2, 3)):
    """A report of hand-made weights, {token: {patch: weight}} a tile; a CLS stands before them."""
    patches = grid[0] * grid[1]
    weights = torch.zeros(len(sent), patches, patches + 1)
    for tile, flows in enumerate(added):
        for token, taken in flows.items():
            for patch, weight in taken.items():
                weights[tile, token, patch + 1] = weight
    keep = torch.zeros(len(sent), patches, dtype=torch.bool)
    for tile, tokens in enumerate(sent):
        keep[tile, list(tokens)] = True
    return ImageReport(
        method="mine",
        tiles=len(sent),
        stock_tokens=keep.numel(),
        kept_tokens=int(keep.sum()) + (0 if extra is None else len(sent)),
        sent=keep,
        grid=grid,
        size=None,
        selection=Selection(keep, {"mine": keep}, Mix(weights, extra, mixed=mixed)),
    )


def test_a_patch_goes_to_its_largest_weight_then_to_the_nearest():
    flows = {0: {1: 0.5, 2: 0.5, 4: 0.1}, 5: {2: 0.5, 1: 0.5, 4: 0.2, 0: 0.9}}
    merging = merging_of(report_of([(0, 5)], [flows]))
    # 1 lies beside 0, 2 beside 5; 4 is more in 5; 0 is a token itself, 3 in none.
    assert merging.into.tolist() == [0, 0, 5, NOWHERE, 5, 5]
    assert merging.merged.tolist() == [False, True, True, False, True, False]
    assert [(token, taken.tolist()) for token, taken in merging.flows] == [
        (0, [1, 2, 4]),
        (5, [0, 1, 2, 4]),
    ]
    assert str(merging) == "2 tokens, which carry 5 patches: 2 their own, 3 merged into 2 of them"


def test_tokens_at_no_patch_and_tiles_that_do_not_mix_are_told_apart():
    extra = torch.tensor([[0, 0, 0.1, 0, 0.1, 0, 0], [0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    report = report_of([(0,), (0, 1)], [{0: {1: 1.0}}, {1: {2: 1.0}}], extra=extra)
    merging = merging_of(report)
    # Tile by tile; in a token at no patch alone are 3 of the first, and 3, 4 and 5 of the second.
    assert merging.into.tolist() == [0, 0] + [NOWHERE] * 5 + [7, 7] + [NOWHERE] * 3
    assert merging.only_held.nonzero()[:, 0].tolist() == [3, 9, 10, 11]
    assert str(merging) == (
        "5 tokens (2 at no patch), which carry 9 patches: 3 their own, 2 merged into 2 of them, "
        "4 in what stands at none"
    )
    half = report_of(
        [(0,), (0, 1)], [{0: {1: 1.0}}, {1: {2: 1.0}}], extra=extra, mixed=(True, False)
    )
    merging = merging_of(half)
    assert [token for token, _ in merging.flows] == [0]
    assert not merging.held[6:].any()
    assert merging.unplaced == 1


def test_weights_of_a_token_that_is_not_sent_are_nobodys():
    merging = merging_of(report_of([(0,)], [{0: {1: 1.0}, 3: {4: 1.0}}]))
    assert merging.into.tolist() == [0, 0] + [NOWHERE] * 4


def test_regions_that_touch_have_colours_of_their_own():
    grid = (12, 16)
    tokens = np.random.default_rng(0).choice(192, 40, replace=False)
    flows = {int(token): {} for token in tokens}
    for patch in set(range(192)) - set(flows):
        far = (tokens // 16 - patch // 16) ** 2 + (tokens % 16 - patch % 16) ** 2
        flows[int(tokens[far.argmin()])][patch] = 1.0
    merging = merging_of(report_of([tuple(flows)], [flows], grid=grid))
    panel = Panel("", torch.arange(192).view(grid), 14)
    colours = region_colours(merging, [panel], 192)
    assert len(colours) > 30
    regions = merging.into.reshape(grid).numpy()
    for lines in (regions, regions.T):
        for one, other in pairwise(lines):
            for a, b in zip(one.tolist(), other.tolist(), strict=True):
                assert a == b or NOWHERE in (a, b) or colours[a] != colours[b]
    few = merging_of(report_of([(0, 2, 4)], [{0: {1: 1.0}, 4: {3: 1.0}, 2: {5: 1.0}}]))
    panel = Panel("", torch.arange(6).view(2, 3), 14)
    assert len(set(region_colours(few, [panel], 6).values())) == 3


def look(bundle, method, image):
    with prune(bundle.model, method) as pruned:
        bundle.embeds(bundle.ids("What is it?"), bundle.pixels(image), [image.size])
        return pruned.last[0]


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_model_merged_is_what_the_picture_says(loaded, kind, method):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 255, (200, 300, 3), np.uint8))
    report = look(loaded(kind), method, image)
    merging, mix = merging_of(report), report.selection.mix
    tiles, patches = report.sent.shape
    skip = mix.added.shape[2] - patches
    carried, merged, takers = set(), set(), set()
    for tile in range(tiles):
        for patch in range(patches):
            if report.sent[tile, patch]:
                carried.add((tile, patch))
                taken = {
                    (tile, other)
                    for other in range(patches)
                    if mix.added[tile, patch, skip + other] != 0
                }
                takers |= {(tile, patch)} if taken else set()
                merged |= {each for each in taken if not report.sent[each]}
            elif mix.extra is not None and mix.extra[tile, skip + patch] != 0:
                carried.add((tile, patch))
    assert len(merging.flows) == len(takers)
    assert int(merging.merged.sum()) == len(merged)
    assert (
        f"which carry {len(carried | merged)} patches: {int(report.sent.sum())} their own"
        in str(merging)
    )
    assert str(merging).startswith(f"{report.kept_tokens} tokens ({tiles} at no patch), ")

    scale = 4 if tiles == 1 else 1
    drawn = np.asarray(report.overlay(image, scale=scale, original=False)).astype(int)
    if not takers:
        assert tiles > 1 or (drawn[:448, 448:] == 255).all()
        return
    side = 112
    # One tile has its second picture beside the first, several have theirs below.
    left, top = (scale * side + 12, 0) if tiles == 1 else (0, None)
    if top is None:
        height = max(p.patches.shape[0] * p.side for p in report.view.frame(image))
        top = next(
            y
            for y in range(height, drawn.shape[0] - 20)
            if (drawn[y : y + 5, :side] != 255).any(-1).all()
        )
    colours = region_colours(merging, report.view.frame(image), patches)
    shown = 0
    for patch in range(patches):  # of the base tile
        into = int(merging.into[patch])
        if into == NOWHERE or report.sent[0, patch]:
            continue
        row, column = divmod(patch, report.grid[1])
        pixel = drawn[top + scale * (14 * row + 6), left + scale * (14 * column + 6)]
        dark = (pixel - 0.6 * np.array(REGIONS[colours[into]])) / 0.4
        assert np.ptp(dark) < 4
        assert dark.min() > -3
        assert dark.max() < 0.36 * 255 + 3
        shown += 1
    assert shown == int(merging.merged[:patches].sum())


@pytest.mark.parametrize(
    "method", [HIVTP(r_max=0.5), HiPrune(r_max=0.5), VisionZip(r_max=1)], ids=str
)
def test_a_method_that_merges_nothing_looks_as_it_did(loaded, photos, method):
    report = look(loaded("llava-1.5-llama"), method, photos[0])
    assert merging_of(report) is None
    assert report.overlay(photos[0], scale=4).width == 2 * 4 * 112 + 12


@pytest.fixture(scope="module")
def page(checkpoints, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    photos[0].save(folder / "photo.png")
    arguments = ["--model-path", str(checkpoints("llava-next-llama")), "--device", "cpu"]
    arguments += ["--image-file", str(folder / "photo.png"), "--r-max", "0.5,0.25"]
    arguments += ["--methods", "visionzip,hivtp"]
    assert main(["show", *arguments, "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_the_page_tells_where_a_patch_went(page, tmp_path):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium (.ci/run does)")
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )
    data = json.loads(text)
    merging = data["methods"][0]["budgets"][0]["merging"]
    assert data["methods"][1]["budgets"][0]["merging"] is None
    members = np.frombuffer(base64.b64decode(merging["members"]), "<i4")
    assert len(members) == sum(merging["counts"])
    browser = Browser(chromium, tmp_path / "profile")
    try:
        browser.open(page)
        browser.eval("document.querySelector('input[value=merged]').click()")
        assert browser.text("merged-note").startswith(f"{merging['text']}. In colours: ")
        at = next(i for i, count in enumerate(merging["counts"]) if count)
        start = sum(merging["counts"][:at])
        told = {}
        for patch in (merging["tokens"][at], int(members[start])):
            browser.eval(
                f"(() => {{ const p = panels.find((p) => p.patches.includes({patch}));"
                f"const at = p.patches.indexOf({patch});"
                "setCursor(p, Math.floor(at / p.columns), at % p.columns) })()"
            )
            told[patch] = browser.text("patch")
        count = merging["counts"][at]
        other = "patch" if count == 1 else "patches"
        assert f"kept: contextual, {count} other {other} in it." in told[merging["tokens"][at]]
        assert "pruned, in 1 token." in told[int(members[start])]
        # A method that merges nothing shows what it keeps.
        browser.eval("(() => { state.method = 1; refresh(); })()")
        assert browser.eval("document.getElementById('merged-note').hidden") is True
        assert "global" in browser.text("key")
        assert browser.problems == []
    finally:
        browser.close()
