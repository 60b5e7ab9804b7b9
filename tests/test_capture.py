"""Attention seen through q and k, against the attention itself."""

import pytest
import torch
from transformers import CLIPVisionModel

from llava_hvp.encoder import capture
from llava_hvp.encoder.capture import QKHooks, recording, reduce_attention
from llava_hvp.encoder.vit import hidden_states, layers_of, project_next
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import Needs


def plain(q, k, heads):
    """(T, heads, S, S), the softmax written out."""
    tiles, tokens, width = q.shape
    split = (tiles, tokens, heads, width // heads)
    q, k = (x.double().view(split).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)


def random_qk(tiles, tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(tiles, tokens, width, generator=generator) for _ in "qk"]


@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize(("tiles", "patches", "heads"), [(1, 4, 1), (3, 64, 4), (2, 576, 16)])
def test_reduced_equals_the_mean_over_the_whole_map(tiles, patches, heads, with_cls):
    q, k = random_qk(tiles, patches + with_cls, heads * 16)
    attention = plain(q, k, heads)
    received, cls = reduce_attention(q, k, heads, patches)
    assert torch.allclose(received.double(), attention.mean((1, 2))[:, with_cls:], atol=1e-8)
    assert torch.allclose(cls.double(), attention[:, :, 0, with_cls:].mean(1), atol=1e-7)
    assert received.dtype == torch.float32


def test_received_attention_sums_to_one_with_its_cls_column():
    q, k = random_qk(2, 65, 64)
    received, _ = reduce_attention(q, k, 4, 65)
    assert torch.allclose(received.sum(1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1000, 70_000, 10**9])
def test_the_chunk_changes_no_more_than_rounding(chunk, monkeypatch):
    q, k = random_qk(3, 65, 64)
    expected, expected_cls = reduce_attention(q, k, 4, 64)
    monkeypatch.setitem(capture.CHUNK, "cpu", chunk)
    received, cls = reduce_attention(q, k, 4, 64)
    assert torch.allclose(received, expected, atol=1e-8)
    assert torch.allclose(cls, expected_cls, atol=1e-8)


def test_a_tile_has_the_same_bits_alone_and_in_a_batch():
    q, k = random_qk(5, 577, 256)
    together, _ = reduce_attention(q, k, 4, 576)
    alone = [reduce_attention(q[i : i + 1], k[i : i + 1], 4, 576)[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_half_precision_is_reduced_in_float32():
    q, k = (x.half() for x in random_qk(1, 65, 64))
    received, _ = reduce_attention(q, k, 4, 64)
    assert torch.equal(received, reduce_attention(q.float(), k.float(), 4, 64)[0])


@pytest.fixture
def tower(checkpoints):
    path = checkpoints("llava-1.5-llama").parent / "clip-112"
    eager = CLIPVisionModel.from_pretrained(path, attn_implementation="eager")
    return CLIPVisionModel.from_pretrained(path), eager, torch.randn(2, 3, 112, 112)


def test_hooks_see_what_eager_attention_computes(tower):
    model, eager, images = tower
    needs = Needs(received_attention=(3, 9, 23), cls_attention=(1, 23))
    hooks = QKHooks(layers_of(model), needs)
    with recording(needs, 4, 64) as scores:
        hidden_states(model, images, 23)
    hooks.remove()
    with torch.no_grad():
        maps = eager(images, output_attentions=True).attentions
    assert set(scores.received_attention) == {3, 9, 23}
    assert set(scores.cls_attention) == {1, 23}
    for layer, received in scores.received_attention.items():
        assert torch.allclose(received, maps[layer - 1].mean((1, 2))[:, 1:], atol=1e-7)
    for layer, cls in scores.cls_attention.items():
        assert torch.allclose(cls, maps[layer - 1][:, :, 0, 1:].mean(1), atol=1e-7)


@pytest.mark.parametrize("layer", [0, 1, 12, 23, 24])
def test_hidden_states_have_the_bits_of_a_full_pass(layer, tower):
    model, _, images = tower
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(hidden_states(model, images, layer), expected)


def test_nothing_is_recorded_outside_a_recording_and_removed_hooks_are_gone(tower):
    model, _, images = tower
    layers = layers_of(model)
    hooks = QKHooks(layers, Needs(received_attention=(5,)))
    hidden_states(model, images, 23)  # no recording: the hooks must stay silent
    assert len(layers[4].self_attn.q_proj._forward_hooks) == 1
    hooks.remove()
    assert not layers[4].self_attn.q_proj._forward_hooks


def test_a_layer_whose_hooks_do_not_fire_is_an_error(tower):
    model, _, images = tower
    with (
        pytest.raises(UnsupportedModelError, match=r"\[9\].*q_proj"),
        recording(Needs(received_attention=(9,)), 4, 64),
    ):
        hidden_states(model, images, 23)


def test_only_the_named_layers_are_hooked(tower):
    model, _, _ = tower
    hooks = QKHooks(layers_of(model), Needs(received_attention=(7, 8)))
    hooked = [
        number
        for number, layer in enumerate(layers_of(model), 1)
        if layer.self_attn.q_proj._forward_hooks or layer.self_attn.k_proj._forward_hooks
    ]
    hooks.remove()
    assert hooked == [7, 8]


# Keys and queries


def by_hand(model, images, layer, side):
    """The output of a layer's projection, of a full pass of an encoder without our hooks."""
    with torch.no_grad():
        before = model(images, output_hidden_states=True).hidden_states[layer - 1]
        block = layers_of(model)[layer - 1]
        projection = getattr(block.self_attn, f"{side}_proj")
        assert projection.bias.any()
        return projection.forward(block.layer_norm1(before))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", ["plain", "eager"])
def test_keys_and_queries_are_what_the_projections_give(which, fused, tower):
    model, images = tower[["plain", "eager"].index(which)], tower[2]
    needs = Needs(received_attention=(5,), cls_attention=(23,), keys=(9, 23, 24), queries=(2, 24))
    expected = {
        (side, layer): by_hand(model, images, layer, side)
        for side, layers in (("k", needs.keys), ("q", needs.queries))
        for layer in layers
    }
    hooks = QKHooks(layers_of(model), needs)
    with recording(needs, 4, 64) as scores:
        hidden = hidden_states(model, images, 23, fused=fused)
        project_next(model, hidden, 23, needs)
    hooks.remove()
    assert (set(scores.keys), set(scores.queries)) == ({9, 23, 24}, {2, 24})
    assert (set(scores.received_attention), set(scores.cls_attention)) == ({5}, {23})
    for (side, layer), whole in expected.items():
        seen = (scores.keys if side == "k" else scores.queries)[layer]
        assert seen.shape == (2, 65, whole.shape[2])
        # Fused attention changes roundings of the layers before.
        assert torch.allclose(seen, whole, atol=1e-5) if fused else torch.equal(seen, whole)
        others = [w for (s, n), w in expected.items() if (s, n) != (side, layer)]
        assert not any(torch.allclose(seen, other, atol=1e-3) for other in others)


def test_the_layer_after_the_selected_one_is_not_run(tower):
    model, _, images = tower
    needs = Needs(keys=(24,), queries=(24,))
    ran = []
    block = layers_of(model)[23]
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in [("layer", block), *block.named_modules()]
        if name
    ]
    hooks = QKHooks(layers_of(model), needs)
    with recording(needs, 4, 64):
        project_next(model, hidden_states(model, images, 23), 23, needs)
    hooks.remove()
    for handle in handles:
        handle.remove()
    assert ran == ["layer_norm1", "self_attn.q_proj", "self_attn.k_proj"]


def test_only_the_projections_that_are_read_are_hooked_and_run(tower):
    model, _, images = tower
    needs = Needs(keys=(7, 24), queries=(9,), received_attention=(3,))
    hooks = QKHooks(layers_of(model), needs)
    hooked = {
        (number, side)
        for number, layer in enumerate(layers_of(model), 1)
        for side in "qk"
        if getattr(layer.self_attn, f"{side}_proj")._forward_hooks
    }
    assert hooked == {(3, "q"), (3, "k"), (7, "k"), (24, "k"), (9, "q")}
    assert hooks.on(layers_of(model))
    with recording(needs, 4, 64) as scores:
        hidden = hidden_states(model, images, 23)
        project_next(model, hidden, 23, needs)
    hooks.remove()
    assert (set(scores.keys), set(scores.queries), set(scores.cls_attention)) == (
        {7, 24},
        {9},
        set(),
    )


@pytest.mark.parametrize("needs", [Needs(keys=(24,)), Needs(queries=(24,)), Needs(keys=(3, 24))])
def test_keys_and_queries_that_were_not_seen_are_an_error(needs, tower):
    model, _, images = tower
    hooks = QKHooks(layers_of(model), needs)
    with pytest.raises(UnsupportedModelError, match=r"\[24\].*q_proj"), recording(needs, 4, 64):
        hidden_states(model, images, 23)  # and nobody projects layer 24
    hooks.remove()


def test_a_method_that_reads_nothing_of_the_next_layer_projects_nothing(tower):
    model, _, images = tower
    block = layers_of(model)[23]
    ran: list[int] = []
    handle = block.layer_norm1.register_forward_hook(lambda *_: ran.append(1))
    project_next(
        model, hidden_states(model, images, 23), 23, Needs(keys=(23,), received_attention=(23,))
    )
    handle.remove()
    assert not ran
    last = hidden_states(model, images, 24)
    project_next(model, last, 24, Needs(keys=(24,)))  # there is no layer 25
