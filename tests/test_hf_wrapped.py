"""transformers' own LLaVA, pruned: compiled, in PEFT, saved, copied, quantised and offloaded."""

import copy
import io

import pytest
import torch
from hf_models import KINDS, ask, load, needs_release

from llava_hvp import HIVTP, Runtime, prune, unprune
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


@pytest.mark.parametrize("how", ["torch.compile", "compile", "forward"])
def test_a_compiled_model(how, hf, photos):
    bundle = hf(KINDS[1]).own()
    inputs, model = ask(bundle, photos), bundle.model
    with prune(model, METHOD) as pruned, torch.no_grad():
        expected, ids = bundle.logits(inputs), bundle.generate(inputs)
        torch._dynamo.reset()
        compiled = model
        if how == "torch.compile":
            compiled = torch.compile(model, backend="eager")
        elif how == "compile":
            model.compile(backend="eager")
        else:
            model.forward = torch.compile(model.forward, backend="eager")
        reports = len(pruned.last)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        assert torch.equal(
            compiled.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)[
                :, inputs["input_ids"].shape[1] :
            ],
            ids,
        )
        assert len(pruned.last) == reports == 2


def test_peft(bundle, photos):
    peft = pytest.importorskip("peft")
    own = bundle.own()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(own.model, config)
    inputs = ask(bundle, photos, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with prune(model, METHOD) as pruned:
        assert torch.equal(
            model.generate(**inputs, do_sample=False, max_new_tokens=4),
            own.model.generate(**inputs, do_sample=False, max_new_tokens=4),
        )
        model.train()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert pruned.last[0].kept_tokens < pruned.last[0].stock_tokens
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # B of an adapter is zero at first, so that A has no gradient yet.
    assert any("language_model" in name for name in trained)
    assert any("vision_tower" in name for name in trained)


def test_saving_writes_what_stock_would(bundle, tmp_path):
    bundle.model.save_pretrained(tmp_path / "stock")
    runtime = Runtime(tower_dtype="model")
    with prune(bundle.model, METHOD, runtime=runtime):
        bundle.model.save_pretrained(tmp_path / "pruned")
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "pruned" / file.name).read_bytes() == file.read_bytes(), file.name


def test_copies_and_pickles_are_pruned_by_themselves(bundle, photos):
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD) as pruned:
        expected = bundle.logits(inputs)
        copied = copy.deepcopy(bundle.model)
    fresh, buffer = load(bundle.path).model, io.BytesIO()  # one that ran, stock cannot pickle
    with prune(fresh, METHOD):
        torch.save(fresh, buffer)
    buffer.seek(0)
    for other in (copied, torch.load(buffer, weights_only=False)):
        assert other.llava_hvp is not pruned
        assert other.llava_hvp.model is other
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, expected)
            other.generate(**inputs, max_new_tokens=2)
        assert len(other.llava_hvp.last) == 2
        unprune(other)
        assert not other._forward_pre_hooks
    with torch.no_grad():
        assert bundle.model(**inputs).logits.shape[1] > expected.shape[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_by_bitsandbytes(bits, bundle, photos, units):
    from transformers import BitsAndBytesConfig

    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **(given if bits == 4 else {}))
    quantised = load(bundle.path, quantization_config=config, device_map="cpu")
    linear = quantised.model.model.vision_tower.get_submodule(
        "encoder.layers.0.mlp.fc1"
        if release() >= (5, 0)
        else "vision_model.encoder.layers.0.mlp.fc1"
    )
    assert f"{bits}bit" in type(linear).__name__
    inputs = ask(bundle, photos)
    stock, ids = quantised.logits(inputs), quantised.generate(inputs)
    with prune(quantised.model, HIVTP(r_max=0.9999)):
        assert torch.equal(quantised.logits(inputs), stock)
        assert torch.equal(quantised.generate(inputs), ids)
    with prune(quantised.model, METHOD) as pruned:
        assert quantised.logits(inputs).isfinite().all()
        assert pruned.last[0].kept_tokens < pruned.last[0].stock_tokens
        quantised.generate(inputs)


def test_offloaded_weights_and_a_device_map(bundle, photos):
    from accelerate import cpu_offload

    inputs = ask(bundle, photos)
    mapped = load(bundle.path, device_map={"": "cpu"})
    offloaded = bundle.own()
    cpu_offload(offloaded.model)
    assert next(offloaded.model.parameters()).is_meta
    with prune(bundle.model, METHOD):
        expected, ids = bundle.logits(inputs), bundle.generate(inputs)
    for other in (mapped, offloaded):
        with prune(other.model, METHOD) as pruned:
            assert torch.equal(other.logits(inputs), expected)
            assert torch.equal(other.generate(inputs), ids)
            assert len(pruned.last) == 2
