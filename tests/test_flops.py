"""Floating point operations, against the published figures and against what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_hvp import HIVTP, FastV, PyramidDrop, SparseVLM, prune
from llava_hvp.bench.flops import as_published, complete
from llava_hvp.checkpoints.geometry import get_geometry, list_geometries
from llava_hvp.checkpoints.synthetic import geometry_of
from llava_hvp.errors import OptionError

ROTARY = 3e-5  # the angles of the positions are a small product in newer transformers


@pytest.mark.parametrize(
    ("visual_tokens", "published"), [(576, 8.63e12), (192, 3.56e12), (128, 2.71e12), (64, 1.87e12)]
)
def test_hiprunes_figures_for_llava_1_5_7b(visual_tokens, published):
    assert as_published(get_geometry("llava-1.5-7b"), visual_tokens) == pytest.approx(
        published, rel=0.01
    )


def test_a_third_of_the_tokens_takes_58_7_percent_less():
    seven = get_geometry("llava-1.5-7b")
    saved = 1 - as_published(seven, 192) / as_published(seven, 576)
    assert saved == pytest.approx(0.587, abs=0.001)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llava-1.5-7b", 6.74e9),
        ("llava-1.5-13b", 13.02e9),
        ("llava-next-mistral-7b", 7.24e9),
    ],
)
def test_the_language_models_have_their_published_sizes(name, weights):
    language = get_geometry(name).language
    total = language.layers * language.layer_weights + 2 * language.hidden * language.vocab
    assert total == pytest.approx(weights, rel=0.002)


def test_an_unknown_geometry_is_named_with_the_known_ones():
    with pytest.raises(OptionError, match=r"'llava-2'.*llava-1.5-7b"):
        get_geometry("llava-2")
    assert len(set(list_geometries())) == len(list_geometries()) >= 6


def counted(bundle, photo, text=9):
    """What torch counts of a prefill with one image and `text` tokens beside it."""
    pixels = bundle.pixels(photo)
    ids = torch.tensor([[1, -200, *range(3, 2 + text)]])
    # torch does not count the CPU's fused attention kernel.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        bundle.model(ids, images=pixels, image_sizes=[photo.size])
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-1.5-mistral"])
def test_torch_counts_the_same_on_stock_llava(own, kind, photos):
    bundle = own(kind)
    tower = geometry_of(bundle.model, "tiny", 1)
    expected = complete(tower, 64, text_tokens=9, layers_run=tower.vision.layers).to_first_token
    assert counted(bundle, photos[0]) == pytest.approx(expected, rel=ROTARY)


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-1.5-mistral"])
def test_torch_counts_the_same_on_a_pruned_one(own, kind, photos):
    bundle = own(kind)
    with prune(bundle.model, HIVTP(r_max=0.5, layers=(3, 4))) as pruned:
        total = counted(bundle, photos[0])
        kept = pruned.last[0].kept_tokens
    expected = complete(geometry_of(bundle.model, "tiny", 1), kept, text_tokens=9, layers_read=2)
    assert kept < 64
    assert total == pytest.approx(expected.to_first_token, rel=ROTARY)


INSIDE = {
    "fastv": FastV(ratio=0.25, layer=1),
    "pyramiddrop": PyramidDrop(ratios=(0.25,), layers=(1,)),
    "sparsevlm": SparseVLM(tokens=(16,), layers=(1,)),
    "sparsevlm 2.0": SparseVLM(tokens=(16,), layers=(1,), version="2.0"),
}


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-1.5-mistral"])
@pytest.mark.parametrize("first", [None, HIVTP(r_max=0.5, layers=(3, 4))], ids=["alone", "behind"])
@pytest.mark.parametrize("second", INSIDE.values(), ids=INSIDE)
def test_torch_counts_the_same_where_tokens_are_dropped_inside(own, kind, first, second, photos):
    bundle = own(kind)
    methods = (second,) if first is None else (first, second)
    with prune(bundle.model, *methods) as pruned:
        total = counted(bundle, photos[0])
        layers = pruned.last[0].layer_tokens
    assert layers[0] > layers[1] == layers[-1]
    expected = complete(
        geometry_of(bundle.model, "tiny", 1),
        layers,
        text_tokens=9,
        text_behind=8,
        layers_read=0 if first is None else 2,
        inside=second,
    )
    assert total == pytest.approx(expected.to_first_token, rel=1e-3)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-mistral-7b"])
def test_layers_of_one_length_are_as_one_number(name):
    geometry = get_geometry(name)
    tokens = [144] * geometry.language.layers
    one, many = (complete(geometry, n, text_tokens=50, new_tokens=3) for n in (144, tokens))
    assert one == many
    assert as_published(geometry, 144) == as_published(geometry, tokens)


def test_fastvs_paper_counts_a_layer_alike():
    """4nD^2 + 2n^2D + 3nDM a layer without the factor 2, and three matrices of the MLP."""
    language = get_geometry("llava-1.5-7b").language
    fastv, layers = FastV(layer=2, ratio=0.5), [576] * 2 + [288] * 30
    found = complete(get_geometry("llava-1.5-7b"), layers, text_tokens=40, inside=fastv)

    def layer(n):
        wide = language.hidden
        return 2 * (4 * n * wide**2 + 2 * n**2 * wide + 3 * n * wide * language.mlp)

    logits = 2 * (288 + 40) * language.hidden * language.vocab
    assert found.prefill == 2 * layer(616) + 30 * layer(328) + logits
    assert found.selection == 2 * 616 * language.hidden  # one row of q k^T, all heads


def test_each_new_token_is_decoded_once():
    seven = get_geometry("llava-1.5-7b")
    one, three = (complete(seven, 144, text_tokens=50, new_tokens=n) for n in (1, 3))
    assert one.decode == 0
    assert three.prefill == one.prefill
    language = seven.language
    weights = language.layers * language.layer_weights + language.hidden * language.vocab
    attended = 195 + 196
    assert three.decode == 2 * 2 * weights + 4 * language.layers * language.hidden * attended
