"""The order of an image's tokens, against stock LLaVA's own method on features that are numbers."""

import functools
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.llava_arch import LlavaMetaForCausalLM
from PIL import Image

from llava_hvp import HIVTP, HiPrune, Random, Uniform, prune
from llava_hvp.hosts.llava.tiling import TilingConfig, layout
from llava_hvp.pruning.layout import NEWLINE
from llava_hvp.runtime import Runtime
from llava_hvp.shapes.weights import checkpoint

# side of a tile, patches along it, pinpoints
RELEASED = (336, 24, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
SMALL = (112, 8, [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]])
LENGTHS = {336: 10_000, 112: 1500}  # by the side of a tile; thinner ones differ in nothing
THIN = [(3, n) for n in range(1, 500, 7)] + [(10, 240), (10, 241), (10, 500), (17, 4000)]


class Numbered:
    """What stock's method is called on: a patch's feature is its number, a newline is -1."""

    device = torch.device("cpu")

    def __init__(self, side, patches, pinpoints):
        self.config = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad",
            image_aspect_ratio="anyres",
            image_grid_pinpoints=pinpoints,
            tune_mm_mlp_adapter=False,
        )
        tower = SimpleNamespace(
            num_patches_per_side=patches, config=SimpleNamespace(image_size=side)
        )
        self.model = SimpleNamespace(
            image_newline=torch.tensor([float(NEWLINE)]),
            embed_tokens=lambda ids: torch.full((len(ids), 1), float("nan")),
            get_vision_tower=lambda: tower,
        )

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.get_vision_tower()

    def encode_images(self, images):
        return images[..., 0]

    def tokens(self, sizes):
        """Of each size the tokens that stock sends, as int64."""
        side = self.get_vision_tower().config.image_size
        patches = self.get_vision_tower().num_patches_per_side ** 2
        images = []
        for size in sizes:
            across, down = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, side)
            tiles = 1 + across * down
            images.append(torch.arange(float(tiles * patches)).view(tiles, patches, 1, 1))
        # A text token, which is no number, ends each image.
        ids = torch.tensor([[IMAGE_TOKEN_INDEX, 1] * len(sizes)])
        sent = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal(
            self, ids, None, None, None, None, images, sizes
        )[4].flatten()
        ends = [-1, *sent.isnan().nonzero().flatten().tolist()]
        return [sent[start + 1 : end].long() for start, end in itertools.pairwise(ends)]


def ours(kind, sizes):
    """The layouts of the same sizes, and how many patches each image has."""
    side, patches, pinpoints = kind
    tiling = TilingConfig("spatial_unpad", "anyres", str(pinpoints), (patches, patches), side)
    for size in sizes:
        across, down = get_anyres_image_grid_shape(size, pinpoints, side)
        tiles = 1 + across * down
        yield layout(tiling, tiles, size, "stock"), tiles * patches**2


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", [RELEASED, SMALL], ids=["336", "112"])
def test_thin_pictures_have_the_tokens_of_stock(kind, turned):
    sizes = [(1, n + 1) for n in range(LENGTHS[kind[0]])] + THIN
    sizes = [size[::-1] if turned else size for size in sizes]
    without_columns = 0
    for start in range(0, len(sizes), 500):
        some = sizes[start : start + 500]
        stock = Numbered(*kind).tokens(some)
        for size, tokens, (place, patches) in zip(some, stock, ours(kind, some), strict=True):
            kept = place.kept(torch.ones(patches, dtype=torch.bool), "rows")
            assert torch.equal(kept, tokens), size
            assert place.stock_tokens == len(tokens), size
            assert torch.equal(place.stock(patches).nonzero()[:, 0], tokens[tokens >= 0].sort()[0])
            without_columns += place.mosaic is not None and 0 in place.mosaic.shape
    assert without_columns > len(sizes) / 2


def rows_of(tokens, base):
    """The patches of each row of the mosaic that stock sends, as lists."""
    rows = [[]]
    for token in tokens[base:].tolist():
        if token == NEWLINE:
            rows.append([])
        else:
            rows[-1].append(token)
    assert rows.pop() == []
    return rows


@pytest.mark.parametrize("newline", ["rows", "all", "none"])
@pytest.mark.parametrize("kind", [RELEASED, SMALL], ids=["336", "112"])
def test_pruned_they_lose_patches_and_the_newlines_of_rows_that_lost_all(kind, newline):
    sizes = [*THIN, *((b, a) for a, b in THIN), (1, 1), (400, 300), (30, 800)]
    base, draw = kind[1] ** 2, random.Random(0)
    stock = Numbered(*kind).tokens(sizes)
    for size, tokens, (place, patches) in zip(sizes, stock, ours(kind, sizes), strict=True):
        keep = [draw.random() < draw.choice((0.02, 0.5)) for _ in range(patches)]
        expected = [patch for patch in range(base) if keep[patch]]
        for row in rows_of(tokens, base):
            kept = [patch for patch in row if keep[patch]]
            ends = {"all": True, "none": False, "rows": len(kept) > 0 or row == []}[newline]
            expected += kept + [NEWLINE] * ends
        assert place.kept(torch.tensor(keep), newline).tolist() == expected, size


PICTURES = [(1, 1), (1, 900), (10, 241), (10, 500), (900, 1), (500, 10), (2, 60)]


@functools.cache
def picture(size):
    return Image.radial_gradient("L").resize(size).convert("RGB")


@pytest.fixture(scope="module", params=["llava-next-llama", "llava-shapes-next"])
def bundle(request, loaded, tmp_path_factory):
    if request.param == "llava-next-llama":
        return loaded(request.param)
    return load(checkpoint(tmp_path_factory.mktemp("weights"), request.param))


@pytest.mark.parametrize("size", PICTURES, ids=str)
def test_the_model_gets_what_stock_sends_of_thin_pictures(bundle, size):
    photo = picture(size)
    pixels, ids = bundle.pixels(photo), bundle.ids("What is it?")
    stock = bundle.embeds(ids, pixels, [size])[0]
    answer = bundle.generate(ids, pixels, [size])
    for method in (Uniform(r_max=1), HIVTP(r_max=1)):
        with prune(bundle.model, method) as pruned:
            assert torch.equal(bundle.embeds(ids, pixels, [size])[0], stock)
            assert torch.equal(bundle.generate(ids, pixels, [size]), answer)
            assert pruned.last[0].kept_of_stock == 1
            assert pruned.last[0].stock_tokens == stock.shape[1] - ids.shape[1] + 1
    for method, newline in ((HiPrune(r_max=0.25), "rows"), (Random(num_tokens=20), "none")):
        with prune(bundle.model, method, runtime=Runtime(newline=newline)) as pruned:
            sent = bundle.embeds(ids, pixels, [size])[0]
            bundle.generate(ids, pixels, [size])
            (report,) = pruned.last
        assert sent.shape[1] == ids.shape[1] - 1 + report.kept_tokens < stock.shape[1]
        assert 0 < report.kept_of_stock < 1
        if photo.size != (1, 1):
            assert report.overlay(photo).width > 0
            assert report._repr_png_()
