"""transformers' own LLaVA: on and off, wrapped, saved, quantised, and every way to call it."""

import copy
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import QUESTIONS, load, needs_release, sized

import llava_hvp
from llava_hvp import HIVTP, HiPrune, Runtime, VisionZip, get_method, prune, unprune
from llava_hvp.errors import (
    PrunedStateError,
    TextEncoderError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from llava_hvp.hosts.hf import versions
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)
KINDS = ["llava-1.5-llama", "llava-next-llama"]


@pytest.fixture(params=KINDS)
def bundle(request, hf):
    return hf(request.param)


def ask(bundle, photos, **kwargs):
    return bundle.ask(*QUESTIONS[:2], pictures=sized(photos)[:2], **kwargs)


def state(model):
    """What pruning could leave behind."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_unpruning_gives_the_model_back_as_it_was(bundle, photos):
    inputs = ask(bundle, photos)
    expected = bundle.logits(inputs)  # with which stock puts hooks of its own
    before, signature = state(bundle.model), inspect.signature(bundle.model.generate)
    weights = {name: w.clone() for name, w in bundle.model.state_dict().items()}
    pruned = prune(bundle.model, METHOD)
    assert inspect.signature(bundle.model.generate) == signature
    assert not torch.equal(expected[:, -1], bundle.logits(inputs)[:, -1])
    with pytest.raises(PrunedStateError, match="pruned already"):
        prune(bundle.model, METHOD)
    unprune(bundle.model)
    assert state(bundle.model) == before
    assert torch.equal(expected, bundle.logits(inputs))
    after = bundle.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    with pytest.raises(PrunedStateError, match="not pruned"):
        unprune(bundle.model)
    assert len(pruned.last) == 2
    with pytest.raises(RuntimeError, match="mine"), prune(bundle.model, METHOD):
        raise RuntimeError("mine")
    assert state(bundle.model) == before


def test_llava_is_not_imported_and_need_not_be_there(bundle):
    code = f"""
import sys, torch
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llava":
            raise ImportError("llava is not installed")
sys.meta_path.insert(0, Missing())
import llava_hvp
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(bundle.path)!r}, dtype=torch.float32)
processor = AutoProcessor.from_pretrained({str(bundle.path)!r})
image = Image.new("RGB", (120, 90), "red")
inputs = processor(images=image, text="USER: <image>\\nWhat? ASSISTANT:", return_tensors="pt")
with llava_hvp.prune(model, llava_hvp.HIVTP(r_max=0.5)) as pruned:
    model.generate(**inputs, max_new_tokens=2)
    report = pruned.last[0]
    report.overlay(image)
assert report.kept_tokens < report.stock_tokens
assert not [name for name in sys.modules if name.split(".")[0] == "llava"]
print("pruned", report.kept_tokens)
"""
    paths = str(Path(llava_hvp.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pruned" in result.stdout


def test_another_release_is_refused(hf, monkeypatch):
    bundle = hf(KINDS[0])
    monkeypatch.setattr(versions, "release", lambda: (4, 37))
    before = state(bundle.model)
    with pytest.raises(UnsupportedVersionError, match=r"4\.57"):
        prune(bundle.model, METHOD)
    assert state(bundle.model) == before


def test_a_failed_attempt_leaves_no_trace(bundle):
    before = state(bundle.model)
    with pytest.raises(TextEncoderError, match="clip_text="):
        prune(bundle.model, get_method("cdpruner", r_max=0.5))
    with pytest.raises(TextEncoderError, match="no CLIP text encoder"):
        prune(bundle.model, get_method("cdpruner", r_max=0.5), clip_text="/nowhere")
    with pytest.raises(llava_hvp.LlavaHvpError, match="layer"):
        prune(bundle.model, HIVTP(r_max=0.5, layers=(24,)))
    assert state(bundle.model) == before
    bundle.model.model.get_image_features = lambda *a: None
    with pytest.raises(PrunedStateError, match="get_image_features"):
        prune(bundle.model, METHOD)
    del bundle.model.model.get_image_features
    assert state(bundle.model) == before


# Every way in


def test_the_model_inside_prunes_too(bundle, photos):
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD) as pruned, torch.no_grad():
        logits = bundle.model(**inputs).logits
        kept = [r.kept_tokens for r in pruned.last]
        hidden = bundle.model.model(**inputs).last_hidden_state
        assert torch.equal(bundle.model.lm_head(hidden), logits)
        by_place = bundle.model(
            inputs["input_ids"],
            inputs["pixel_values"],
            **{k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")},
        ).logits
        assert torch.equal(by_place, logits)
        features = bundle.model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
        )
        features = features if release() < (5, 0) else features.pooler_output
        assert [len(tokens) for tokens in features] == kept
        inner = bundle.model.model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
        )
        inner = inner if release() < (5, 0) else inner.pooler_output
        assert all(torch.equal(a, b) for a, b in zip(features, inner, strict=True))


def test_a_direct_call_of_forward_prunes_in_the_model_inside(bundle, photos):
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD), torch.no_grad():
        assert torch.equal(bundle.model.forward(**inputs).logits, bundle.logits(inputs))


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


# Training


def test_labels_line_up_with_the_pruned_sequence(bundle, photos):
    inputs = ask(bundle, photos, side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == bundle.model.config.image_token_id), -100)
    with prune(bundle.model, METHOD) as pruned, torch.no_grad():
        output = bundle.model(**inputs, labels=labels)
        kept, stock = (
            [getattr(r, n) for r in pruned.last] for n in ("kept_tokens", "stock_tokens")
        )
    total, count = 0.0, 0
    for row in range(2):
        real = labels[row][mask[row].bool()]
        visual = (ids[row][mask[row].bool()] == bundle.model.config.image_token_id).nonzero()[:, 0]
        gone = set(visual[kept[row] :].tolist())
        short = [int(n) for place, n in enumerate(real) if place not in gone]
        assert len(short) == len(real) - stock[row] + kept[row]
        for place, label in enumerate(short[1:]):
            if label != -100:
                total -= float(output.logits[row, place].log_softmax(-1)[label])
                count += 1
    assert float(output.loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["hivtp", "visionzip", "prumerge", "cdpruner"])
def test_a_trained_tower_gets_its_gradient(name, bundle, photos, checkpoints):
    own, inputs = bundle.own(), ask(bundle, photos, side="right")
    clip = checkpoints(KINDS[0]).parent / "clip-112"
    with prune(own.model.train(), get_method(name, r_max=0.25), clip_text=clip):
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        tower = own.model.model.vision_tower
        gradients = {n: p.grad for n, p in tower.named_parameters() if "layers.22.mlp" in n}
        assert gradients
        assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
        # A step along the gradient, and the loss is smaller: it is the gradient of this loss.
        first = own.model(**inputs, labels=inputs["input_ids"]).loss
        with torch.no_grad():
            for parameter in own.model.model.multi_modal_projector.parameters():
                parameter -= 1e-3 * parameter.grad
        assert own.model(**inputs, labels=inputs["input_ids"]).loss < first
    own.model.zero_grad()
    own.model.requires_grad_(False)
    own.model.model.multi_modal_projector.requires_grad_(True)
    with prune(own.model, get_method(name, r_max=0.25), clip_text=clip):
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in tower.parameters())
    assert all(p.grad.any() for p in own.model.model.multi_modal_projector.parameters())


def test_gradient_checkpointing(hf, photos):
    own = hf(KINDS[1]).own()
    inputs = ask(own, photos, side="right")

    def gradients():
        own.model.zero_grad()
        own.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in own.model.parameters() if p.grad is not None]

    with prune(own.model.train(), METHOD):
        plain = gradients()
        own.model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients()
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


# Runtime


def test_more_tokens_than_placeholders(hf, photos):
    bundle = hf(KINDS[1])
    thin = photos[0].resize((400, 30))  # of which unpad cuts most of the mosaic
    inputs = bundle.ask(*QUESTIONS[:2], pictures=[thin, photos[1]])
    with prune(bundle.model, HiPrune(r_max=0.9), runtime=Runtime(patch_merge="spatial")) as pruned:
        logits, ids = bundle.logits(inputs), bundle.generate(inputs)
        placeholders = (inputs["input_ids"] == bundle.model.config.image_token_id).sum(1)
        assert pruned.last[0].kept_tokens > placeholders[0]
        alone = bundle.ask(QUESTIONS[0], pictures=[thin])
        assert torch.equal(bundle.generate(alone)[0], ids[0])
        torch.testing.assert_close(bundle.logits(alone)[0, -1], logits[0, -1], atol=1e-4, rtol=0)


def test_the_tower_in_the_models_dtype(hf, photos):
    own = hf(KINDS[0]).own()
    own.model.bfloat16()
    own.model.model.vision_tower.float()
    inputs = ask(own, photos)
    with prune(own.model, METHOD):  # stock would fail: the projector gets float32
        assert own.model.model.vision_tower.dtype == torch.float32
        assert own.logits(inputs).dtype == torch.bfloat16
    with prune(own.model, METHOD, runtime=Runtime(tower_dtype="model")):
        own.logits(inputs)
        assert own.model.model.vision_tower.dtype == torch.bfloat16
    assert own.model.model.vision_tower.dtype == torch.float32


def test_an_image_that_comes_again_is_not_encoded_again(bundle, photos):
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD) as pruned:
        first = bundle.logits(inputs)
        pruned.reuse = True
        bundle.logits(inputs)
        again = bundle.logits(inputs)
        assert all(report.reused for report in pruned.last)
    assert torch.equal(first, again)


def test_overlays_show_the_picture(bundle, photos):
    pictures = sized(photos)[:2]
    inputs = ask(bundle, photos)
    with prune(bundle.model, VisionZip(num_tokens=40), tokenizer=bundle.processor) as pruned:
        bundle.logits(inputs)
        for report, picture in zip(pruned.last, pictures, strict=True):
            report_size = report.size or picture.size
            assert report_size == picture.size
            assert report.overlay(picture).width > 0
            frame = report.view.frame(picture)
            assert sum(panel.patches.numel() for panel in frame) == report.selection.keep.numel()


# What cannot be right


def refused(given):
    """name -> (arguments of a forward pass or generate, words of the error)."""
    ids, mask = given["input_ids"], given["attention_mask"]
    square = torch.ones(2, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    embeds = torch.zeros(*ids.shape, 64)
    return {
        "4-D mask": ({"attention_mask": square}, "attention_mask of shape"),
        "embeddings": ({"inputs_embeds": embeds}, "inputs_embeds"),
        "another layer": ({"vision_feature_layer": -1}, "vision_feature_layer=-1"),
        "layers": ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        "CLS": ({"vision_feature_select_strategy": "full"}, "select_strategy='full'"),
        "no ids": ({"input_ids": None}, "without input_ids"),
        "fewer placeholders": ({"input_ids": ids[:, :-30], "attention_mask": mask[:, :-30]}, ""),
        "packed": ({"position_ids": torch.arange(ids.shape[1]).expand(ids.shape) % 50}, "packed"),
        "videos": ({"pixel_values_videos": torch.zeros(1)}, "videos"),
        "another count": ({"pixel_values": given["pixel_values"][:1]}, ""),
    }


@pytest.mark.parametrize(
    "name",
    refused(
        {"input_ids": torch.zeros(2, 99), "attention_mask": torch.zeros(2, 99), "pixel_values": [0]}
    ),
)
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_what_cannot_be_right_is_refused(way, name, bundle, photos):
    inputs = ask(bundle, photos)
    if name == "fewer placeholders":  # truncated
        token = bundle.model.config.image_token_id
        last = int((inputs["input_ids"][1] == token).nonzero()[-1])
        cut = {k: inputs[k][:, :last] for k in ("input_ids", "attention_mask")}
        changed, words = cut, "do not match"
    else:
        changed, words = refused(inputs)[name]
        words = words or "image"
    with prune(bundle.model, METHOD), pytest.raises(UnsupportedModelError, match=words) as caught:
        call = bundle.model if way == "forward" else bundle.model.generate
        call(**{**inputs, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"prefill_chunk_size": 8},
        {"custom_generate": print},
    ],
    ids=lambda given: next(iter(given)),
)
def test_ways_to_generate_that_are_refused(given, hf, photos):
    bundle = hf(KINDS[0])
    inputs = ask(bundle, photos)
    if "assistant_model" in given:
        given = {"assistant_model": bundle.model}
    with prune(bundle.model, METHOD):
        with pytest.raises(UnsupportedModelError, match=next(iter(given))):
            bundle.model.generate(**inputs, **given)
        text = bundle.inputs("USER: Hello ASSISTANT:", None)
        if "prompt_lookup_num_tokens" in given:  # of text alone nothing is refused
            bundle.model.generate(**text, **given, max_new_tokens=3)


def test_features_encoded_elsewhere_are_refused(bundle, photos):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if release() < (5, 0):
        pytest.skip("this release takes none")
    inputs = ask(bundle, photos)
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pixels = {k: v for k, v in inputs.items() if k not in text}
        encoded = {"image": bundle.model.get_image_features(**pixels)}
        assert isinstance(encoded["image"], BaseModelOutputWithPooling)
    with prune(bundle.model, METHOD):
        for call in (bundle.model, bundle.model.generate):
            with pytest.raises(UnsupportedModelError, match="mm_encoder_outputs"):
                call(**text, mm_encoder_outputs=encoded)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("vision_feature_layer", [-2, -1]), ("vision_feature_select_strategy", "full")],
)
def test_features_of_several_layers_or_with_cls_are_refused(setting, value, hf):
    own = hf(KINDS[0]).own()
    setattr(own.model.config, setting, value)
    before = state(own.model)
    with pytest.raises(UnsupportedModelError, match=setting):
        prune(own.model, METHOD)
    assert state(own.model) == before


def test_next_without_sizes_or_with_tiles_of_another_cut(hf, photos):
    bundle = hf(KINDS[1])
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD), torch.no_grad():
        sizes = inputs.pop("image_sizes")
        with pytest.raises(UnsupportedModelError, match="without image_sizes"):
            bundle.model(**inputs)
        with pytest.raises(UnsupportedModelError, match="do not match"):
            bundle.model(**inputs, image_sizes=torch.tensor([[10, 300], [10, 300]]))
        fewer = {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}
        with pytest.raises(UnsupportedModelError, match="image_grid_pinpoints"):
            bundle.model(**fewer, image_sizes=sizes)
        small = {**inputs, "pixel_values": inputs["pixel_values"][..., :56, :56]}
        with pytest.raises(UnsupportedModelError, match="112 x 112"):
            bundle.model(**small, image_sizes=sizes)
