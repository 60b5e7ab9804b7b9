"""How the vision tower is run: fused attention where the host's is eager, and its dtype."""

import pytest
import torch
from conftest import load
from torch.nn import functional

from llava_hvp import HIVTP, prune
from llava_hvp.encoder import vit
from llava_hvp.errors import OptionError, UnsupportedModelError
from llava_hvp.hosts.llava.tower import tower_facts
from llava_hvp.runtime import Runtime


@pytest.fixture
def fused_calls(monkeypatch):
    """How often our own layer ran."""
    calls = []
    stock = functional.scaled_dot_product_attention

    class Counting:
        @staticmethod
        def scaled_dot_product_attention(*args):
            calls.append(1)
            return stock(*args)

    monkeypatch.setattr(vit, "functional", Counting)
    return calls


@pytest.fixture
def eager(checkpoints, photos):
    """A LLaVA whose tower has eager attention, as under transformers 4.37, and its pixels.

    Loaded anew: transformers 5 leaves hooks on the layers of a tower that gave hidden states.
    """
    bundle = load(checkpoints("llava-1.5-llama"))
    tower = bundle.model.get_vision_tower()
    tower.vision_tower.config._attn_implementation = "eager"
    for layer in vit.layers_of(tower.vision_tower):
        layer.self_attn.config._attn_implementation = "eager"
    return bundle, bundle.pixels(photos[0])


def encoded(bundle, pixels, **options):
    """(features, patches kept) of one image."""
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=Runtime(**options)) as pruned:
        features = bundle.model.get_vision_tower().encode(pixels, (1,)).features
        bundle.model.encode_images(pixels)
        return features, pruned.last[0].selection.keep


def test_eager_attention_is_replaced_by_the_fused_one(eager, fused_calls):
    bundle, pixels = eager
    features, keep = encoded(bundle, pixels)
    assert len(fused_calls) == 2 * 23  # all layers up to the selected one, in both calls
    stock = bundle.model.get_vision_tower()(pixels)
    torch.testing.assert_close(features, stock, rtol=1e-4, atol=1e-5)
    fused_calls.clear()
    same, stock_keep = encoded(bundle, pixels, tower_attention="stock")
    assert not fused_calls
    assert torch.equal(same, stock)
    assert torch.equal(keep, stock_keep)


def test_attention_that_is_fused_already_stays(eager, fused_calls):
    bundle, pixels = eager
    for layer in vit.layers_of(bundle.model.get_vision_tower().vision_tower):
        layer.self_attn.config._attn_implementation = "sdpa"
    encoded(bundle, pixels)
    assert not fused_calls


@pytest.mark.parametrize("what", ["hook", "accelerate"])
def test_a_layer_that_something_watches_runs_as_it_is(what, eager, fused_calls):
    bundle, pixels = eager
    seen = []
    layer = vit.layers_of(bundle.model.get_vision_tower().vision_tower)[4]
    if what == "hook":
        layer.register_forward_hook(lambda *args: seen.append(1))
    else:
        layer.self_attn._hf_hook = object()
    encoded(bundle, pixels)
    assert len(fused_calls) == 2 * 22
    assert len(seen) == (2 if what == "hook" else 0)


def test_keeping_all_leaves_the_tower_as_it_is(eager, fused_calls):
    bundle, pixels = eager
    tower = bundle.model.get_vision_tower()
    with prune(bundle.model, HIVTP(r_max=1), runtime=Runtime(tower_dtype="model")):
        tower.encode(pixels.bfloat16(), (1,))
        assert tower.dtype == torch.float32
        features = tower.encode(pixels, (1,)).features
    assert not fused_calls
    assert torch.equal(features, tower(pixels))


def test_the_towers_dtype_follows_the_images_and_comes_back(own, photos):
    bundle = own("llava-1.5-llama")
    model, tower = bundle.model.bfloat16(), bundle.model.get_vision_tower()
    tower.float()  # as LLaVA's scripts leave it
    before = {name: p.clone() for name, p in tower.named_parameters()}
    pixels = bundle.pixels(photos[0]).bfloat16()
    with prune(model, HIVTP(r_max=0.5)):
        full = tower.encode(pixels, (1,)).features
        assert tower.dtype == torch.float32
    with prune(model, HIVTP(r_max=0.5), runtime=Runtime(tower_dtype="model")) as pruned:
        half = tower.encode(pixels, (1,)).features
        assert tower.dtype == torch.bfloat16
        model.encode_images(pixels)
        assert pruned.last[0].kept_tokens < 64
    assert full.dtype == half.dtype == torch.bfloat16
    assert 0 < (full - half).abs().mean() < 0.1 * full.abs().mean()
    assert tower.dtype == torch.float32
    assert all(torch.equal(before[name], p) for name, p in tower.named_parameters())


@pytest.mark.parametrize("kind", ["quantised", "partitioned"])
def test_a_tower_that_cannot_change_says_so(own, photos, kind):
    bundle = own("llava-1.5-llama")
    tower = bundle.model.get_vision_tower()
    layer = vit.layers_of(tower.vision_tower)[3].self_attn.v_proj
    if kind == "quantised":
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    else:
        layer.weight.ds_id = 7  # as ZeRO-3 leaves it
    with (
        prune(bundle.model, HIVTP(r_max=0.5), runtime=Runtime(tower_dtype="model")),
        pytest.raises(UnsupportedModelError, match=rf"{kind}.*v_proj"),
    ):
        tower.encode(bundle.pixels(photos[0]).bfloat16(), (1,))


def test_what_ran_is_told(eager, fused_calls):
    bundle, _ = eager
    tower = bundle.model.get_vision_tower()
    assert tower_facts(tower)["vision_tower_attention"] == "eager"
    for r_max, option, attention in (
        (0.5, "sdpa", "sdpa"),
        (0.5, "stock", "eager"),
        (1.0, "sdpa", "eager"),
    ):
        runtime = Runtime(tower_attention=option)
        with prune(bundle.model, HIVTP(r_max=r_max), runtime=runtime):
            facts = tower_facts(tower)
        assert facts == {"vision_tower_dtype": "float32", "vision_tower_attention": attention}
    vit.layers_of(tower.vision_tower)[4].register_forward_hook(lambda *args: None)
    with prune(bundle.model, HIVTP()):
        assert tower_facts(tower)["vision_tower_attention"] == "eager, sdpa"


@pytest.mark.parametrize("option", ["tower_attention", "tower_dtype"])
def test_other_values_are_refused(option):
    with pytest.raises(OptionError, match=f"Runtime: {option}='flash': give one of"):
        Runtime(**{option: "flash"})
