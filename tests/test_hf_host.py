"""transformers' own LLaVA: pruned and given back, every way to call it, and its options."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import KINDS, QUESTIONS, ask, needs_release, sized, state

import llava_hvp
from llava_hvp import HIVTP, HiPrune, Runtime, VisionZip, get_method, prune, unprune
from llava_hvp.errors import (
    OptionError,
    PrunedStateError,
    TextEncoderError,
)
from llava_hvp.hosts.hf.host import CLIP
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


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


def test_a_failed_attempt_leaves_no_trace(bundle, monkeypatch):
    monkeypatch.delattr(bundle.model.config, CLIP)  # as of a checkpoint that we did not convert
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


def test_one_tiling_for_all_pictures_is_the_processors_to_set(hf, photos):
    own = hf(KINDS[1]).own()
    with pytest.raises(OptionError, match="image_grid_pinpoints"):
        prune(own.model, METHOD, runtime=Runtime(tiling="672"))
    assert "llava_hvp" not in vars(own.model)
    cut = own.processor.image_processor
    before = cut.image_grid_pinpoints
    try:
        cut.image_grid_pinpoints = own.model.config.image_grid_pinpoints = [[224, 224]]
        inputs = own.ask(*QUESTIONS, pictures=sized(photos))
    finally:
        cut.image_grid_pinpoints = before
    expected = own.logits(inputs)
    with prune(own.model, HiPrune(r_max=0.9999)) as pruned:
        assert torch.equal(own.logits(inputs), expected)
        assert [report.tiles for report in pruned.last] == [5, 5, 5]
    with prune(own.model, METHOD) as pruned:
        own.generate(inputs)
        assert all(report.kept_tokens < report.stock_tokens for report in pruned.last)


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
