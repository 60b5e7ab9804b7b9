"""Towers that tensor parallelism has split: refused with the remedy, never read as if whole."""

import pytest
import torch
from conftest import load
from torch import nn

from llava_hvp import HIVTP, HiPrune, HiPrunePlus, Uniform, prune
from llava_hvp.encoder.capture import QKHooks, recording
from llava_hvp.encoder.vit import hidden_states, layers_of
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.llava.compat.versions import transformers_version
from llava_hvp.methods.base import Needs

POLICY = r"injection_policy={LlamaDecoderLayer: \(\"self_attn.o_proj\", \"mlp.down_proj\"\)}"


class Shard(nn.Module):
    """A Linear as DeepSpeed's AutoTP leaves it: a part of the weight, and no in_features."""

    def __init__(self, linear, columns=slice(None), rows=slice(None)):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data[columns, rows].clone())
        self.bias = nn.Parameter(linear.bias.data[columns].clone())

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Hidden(nn.Module):
    """A part of a Linear that shows nothing of its width, as with packed weights."""

    def __init__(self, linear):
        super().__init__()
        self._own = [Shard(linear, HALF)]

    def forward(self, x):
        return self._own[0](x)


def halved(linear):
    """The first half of a Linear's columns, as a Linear."""
    half = nn.Linear(linear.in_features, linear.out_features // 2)
    half.weight.data, half.bias.data = linear.weight.data[HALF], linear.bias.data[HALF]
    return half


HALF = slice(0, 32)  # of the tiny towers' 64
KINDS = {"Linear": halved, "weight": lambda linear: Shard(linear, HALF), "hidden": Hidden}


def shard(model, kind):
    """Give every layer of a LLaVA's tower half of its heads."""
    if kind == "hidden" and (4, 46) <= transformers_version() < (5, 0):
        pytest.skip("this transformers' own layers refuse it, before any that is read")
    for layer in layers_of(model.get_vision_tower().vision_tower):
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, KINDS[kind](getattr(attention, name)))
        attention.out_proj = Shard(attention.out_proj, rows=HALF)


@pytest.fixture
def bundle(checkpoints):
    """Loaded anew: transformers 5 leaves hooks on the layers of a tower that gave hidden states."""
    return load(checkpoints("llava-1.5-llama"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", [HIVTP(), HiPrune(), HiPrunePlus(text="llm")], ids=["hivtp", "hiprune", "hiprune++"]
)
def test_a_sharded_tower_is_refused_with_the_remedy(bundle, photos, method, kind):
    shard(bundle.model, kind)
    tower = bundle.model.get_vision_tower()
    before = type(tower), set(vars(tower)), set(vars(bundle.model))
    with (
        pytest.raises(UnsupportedModelError, match=f"32 wide and not 64.*{POLICY}"),
        prune(bundle.model, method),
    ):
        bundle.embeds(bundle.ids("What is it?"), bundle.pixels(photos[0]), None)
    assert (type(tower), set(vars(tower)), set(vars(bundle.model))) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_is_sharded_after_prune_is_refused(bundle, photos, kind):
    arguments = bundle.ids("What is it?"), bundle.pixels(photos[0]), None
    with prune(bundle.model, HIVTP(r_max=0.5)):
        bundle.embeds(*arguments)
        shard(bundle.model, kind)
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=POLICY):
                bundle.embeds(*arguments)


@pytest.mark.parametrize("names", [("q_proj",), ("k_proj",), ("q_proj", "k_proj")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_projection_of_a_layer_that_is_read_is_refused(bundle, names, kind):
    """By one side too: keys of fewer heads than queries are no CLIP either."""
    model = bundle.model.get_vision_tower().vision_tower
    attention = layers_of(model)[4].self_attn
    needs, pixels = Needs(received_attention=(5,)), torch.zeros(1, 3, 112, 112)
    for name in names:
        setattr(attention, name, KINDS[kind](getattr(attention, name)))

    def read():
        QKHooks(layers_of(model), needs)
        with recording(needs, 4, 64):
            hidden_states(model, pixels, 6)

    with pytest.raises(UnsupportedModelError, match=f"{names[0]} of layer 5 .*{POLICY}"):
        read()
    if kind != "hidden":  # found out before any hook was set
        assert not any(module._forward_hooks for module in model.modules())


def test_fused_attention_of_ours_takes_no_part_of_the_heads_for_the_whole(bundle, photos):
    """Where the method reads no attention, nothing is tapped: the features would be wrong."""
    tower = bundle.model.get_vision_tower()
    tower.vision_tower.config._attn_implementation = "eager"
    for layer in layers_of(tower.vision_tower):
        layer.self_attn.config._attn_implementation = "eager"
    shard(bundle.model, "weight")
    with (
        prune(bundle.model, Uniform(r_max=0.5)),
        pytest.raises(UnsupportedModelError, match=f"q_proj of the vision tower is 32.*{POLICY}"),
    ):
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), None)


def test_projections_that_hide_their_width_are_no_reason(bundle, photos):
    """Packed or partitioned weights: what comes out of them counts."""
    ids, pixels = bundle.ids("x"), bundle.pixels(photos[0])
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        bundle.embeds(ids, pixels, None)
        expected = pruned.last[0].selection.keep
        for layer in layers_of(bundle.model.get_vision_tower().vision_tower):
            for name in ("q_proj", "k_proj"):
                hidden = Hidden(getattr(layer.self_attn, name))
                hidden._own[0] = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, hidden)
        bundle.embeds(ids, pixels, None)
        assert torch.equal(pruned.last[0].selection.keep, expected)
