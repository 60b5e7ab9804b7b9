"""transformers' own LLaVA: where nothing is pruned, nothing changes, bit for bit."""

import pytest
import torch
from hf_families import KeepEverything
from hf_models import KINDS, QUESTIONS, needs_release, sized

from llava_hvp import (
    HIVTP,
    Random,
    Runtime,
    VisionMethod,
    get_method,
    list_methods,
    prune,
)

pytestmark = needs_release


KEEPERS = {
    "r_max=1": HIVTP(r_max=1),
    "r_max=0.9999": Random(r_max=0.9999),
    "choose keeps all": KeepEverything(r_max=0.5),
}
OWN = [
    n for n in list_methods(VisionMethod) if type(get_method(n)).__module__.startswith("llava_hvp.")
]


def forms(bundle, photos):
    """name -> inputs, for every way that text and images come in."""
    pictures = sized(photos)
    rows = [
        f"USER: <image>\n<image>\n{QUESTIONS[0]} ASSISTANT:",
        f"USER: {QUESTIONS[1]} ASSISTANT:",
        f"USER: <image>\n{QUESTIONS[2]} ASSISTANT:",
    ]
    return {
        "one": bundle.ask(QUESTIONS[0], pictures=pictures[:1]),
        "ragged": bundle.ask(*QUESTIONS, pictures=pictures),
        "ragged, right": bundle.ask(*QUESTIONS, pictures=pictures, side="right"),
        "2, 0 and 1 images": bundle.inputs(rows, pictures),
        "text": bundle.inputs(rows[1:2], None),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_is_stock_bit_for_bit(kind, hf, photos):
    bundle = hf(kind)
    for name, inputs in forms(bundle, photos).items():
        logits, ids = bundle.logits(inputs), bundle.generate(inputs)
        for keeper, method in KEEPERS.items():
            with prune(bundle.model, method) as pruned:
                assert torch.equal(logits, bundle.logits(inputs)), (name, keeper)
                assert torch.equal(ids, bundle.generate(inputs)), (name, keeper)
            if "pixel_values" in inputs:
                assert all(r.kept_tokens == r.stock_tokens for r in pruned.last)
            else:
                assert not pruned.last
        assert torch.equal(logits, bundle.logits(inputs)), name


@pytest.mark.parametrize("name", OWN)
def test_every_method_at_a_ratio_of_one(name, hf, photos):
    bundle = hf("llava-next-llama")
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    logits = bundle.logits(inputs)
    with prune(bundle.model, get_method(name, r_max=1)):
        assert torch.equal(logits, bundle.logits(inputs))


def test_the_comparison_can_fail(hf, photos):
    bundle = hf("llava-1.5-llama")
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    logits, ids = bundle.logits(inputs), bundle.generate(inputs)
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        short = bundle.logits(inputs)
        assert short.shape[1] == logits.shape[1] - 48
        assert not torch.equal(bundle.generate(inputs), ids)
        assert pruned.last[0].kept_tokens == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_pixels_of_another(dtype, hf, photos):
    bundle = hf("llava-next-llama").own()
    bundle.model.to(dtype)
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])  # float32, as a processor gives them
    logits = bundle.logits(inputs)
    with prune(bundle.model, KEEPERS["choose keeps all"]):
        assert torch.equal(logits, bundle.logits(inputs))
    assert logits.dtype == dtype


def test_eager_attention_in_the_tower(hf, photos):
    bundle = hf("llava-1.5-llama").own()
    bundle.model.set_attn_implementation("eager")
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    logits = bundle.logits(inputs)
    with prune(bundle.model, KEEPERS["choose keeps all"], runtime=Runtime(tower_attention="stock")):
        assert torch.equal(logits, bundle.logits(inputs))
    with prune(bundle.model, KEEPERS["choose keeps all"]):  # torch's fused one: other rounding
        torch.testing.assert_close(logits, bundle.logits(inputs), atol=1e-4, rtol=1e-4)


def test_gradients_of_every_part_are_stocks(hf, photos):
    bundle = hf("llava-next-llama").own()
    model = bundle.model.train()
    inputs = bundle.ask(*QUESTIONS[:2], pictures=sized(photos)[:2], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients():
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients()
    with prune(model, KEEPERS["choose keeps all"]):
        ours, found = gradients()
    assert torch.equal(loss, ours)
    assert found.keys() == expected.keys()
    assert any("vision_tower" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
