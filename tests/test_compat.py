"""Versions that we know, and the gaps between them."""

import importlib
import inspect
import json
import logging
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llava_hvp import HIVTP, prune
from llava_hvp.errors import UnsupportedVersionError
from llava_hvp.hosts.llava import compat
from llava_hvp.hosts.llava.compat import generation, loading, versions


@pytest.fixture
def unchecked():
    """`check_versions` remembers that all is well; forget it around a test."""
    versions.check_versions.cache_clear()
    yield
    versions.check_versions.cache_clear()


@pytest.mark.parametrize("version", ["4.31.0", "6.0.1", None])
def test_an_unsupported_transformers_is_named(version, unchecked, monkeypatch):
    monkeypatch.setattr(versions, "version_of", lambda name: version)
    named = rf"transformers {version or 'none'}.*4\.37\.2, 4\.57"
    with pytest.raises(UnsupportedVersionError, match=named):
        versions.check_versions()


def test_a_missing_llava_is_named(unchecked, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedVersionError, match=r"no module `llava`.*pip install"):
        versions.check_versions()


def test_a_llava_with_other_arguments_is_refused(unchecked, monkeypatch):
    from llava.model.llava_arch import LlavaMetaForCausalLM

    def newer(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=None,
        image_sizes=None,
    ):
        raise NotImplementedError

    monkeypatch.setattr(LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal", newer)
    with pytest.raises(UnsupportedVersionError, match=r"modalities.*1\.2\.2\.post1"):
        versions.check_versions()


def test_the_error_that_llava_swallows_is_shown(tmp_path):
    """llava/model/__init__.py has a bare except; what fails inside must reach the user."""
    package = tmp_path / "llava"
    (package / "model" / "language_model").mkdir(parents=True)
    (package / "__init__.py").write_text("from .model import LlavaLlamaForCausalLM\n")
    (package / "model" / "__init__.py").write_text(
        textwrap.dedent("""
            try:
                from .language_model.llava_llama import LlavaLlamaForCausalLM
            except:
                pass
        """)
    )
    (package / "model" / "language_model" / "__init__.py").write_text("")
    (package / "model" / "language_model" / "llava_llama.py").write_text(
        "import a_missing_library\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", "import llava_hvp.hosts.llava"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}", "PATH": "/usr/bin"},
        check=False,
    )
    assert result.returncode != 0
    assert "UnsupportedVersionError" in result.stderr
    assert "No module named 'a_missing_library'" in result.stderr


@pytest.mark.parametrize(
    "kind", ["llava-1.5-llama-unfrozen", "llava-next-llama-unfrozen", "llava-next-mistral-unfrozen"]
)
def test_an_unfrozen_tower_has_the_weights_of_the_llava_checkpoint(kind, loaded):
    """Every tensor of it: a key that does not match would leave made-up weights silently."""
    bundle = loaded(kind)
    prefix = "model.vision_tower.vision_tower.vision_model."
    stored = {
        key.removeprefix(prefix): tensor
        for key, tensor in load_file(bundle.path / "model.safetensors").items()
        if key.startswith(prefix)
    }
    held = {
        key.removeprefix("vision_model."): tensor
        for key, tensor in bundle.model.get_vision_tower().vision_tower.state_dict().items()
    }
    assert len(stored) > 24 * 16
    for key, tensor in stored.items():
        assert torch.equal(held[key], tensor.float()), key


def test_tower_weights_that_the_checkpoint_lacks_come_from_the_towers_own(tmp_path, checkpoints):
    """Stock leaves uninitialised memory there under transformers 4, random weights under 5."""
    import json
    import shutil

    from conftest import load

    folder = tmp_path / "llava-1.5-lacking"
    shutil.copytree(checkpoints("llava-1.5-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["unfreeze_mm_vision_tower"] = True
    (folder / "config.json").write_text(json.dumps(config))
    held = load(folder).model.get_vision_tower().vision_tower.state_dict()
    own = transformers.CLIPVisionModel.from_pretrained(config["mm_vision_tower"]).state_dict()
    assert held.keys() == own.keys()
    for key, tensor in own.items():
        assert torch.equal(held[key], tensor.half().float()), key


def test_prune_makes_generation_work_without_the_process_wide_bridge(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), None
    with prune(bundle.model, HIVTP(r_max=0.5)):
        expected = bundle.generate(*arguments)
        compat.unbridge()
        try:
            assert torch.equal(bundle.generate(*arguments), expected)
        finally:
            compat.bridge()


def test_bridge_is_undone_exactly_and_may_be_called_twice():
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder import clip_encoder

    compat.unbridge()
    before = dict(vars(LlavaLlamaForCausalLM)), dict(vars(clip_encoder))
    with compat.bridged():
        compat.bridge()
    assert (dict(vars(LlavaLlamaForCausalLM)), dict(vars(clip_encoder))) == before
    compat.bridge()


def test_the_bridge_drops_only_what_forward_does_not_take(loaded):
    bundle = loaded("llava-1.5-llama")
    names = inspect.signature(type(bundle.model).forward).parameters
    inputs = generation.prepare_inputs_for_generation(
        bundle.model,
        torch.ones(1, 3, dtype=torch.long),
        attention_mask=torch.ones(1, 3),
        cache_position=torch.arange(3),
        use_cache=True,
    )
    assert "cache_position" not in inputs
    assert "attention_mask" in inputs
    assert set(inputs) <= set(names)


def test_found_versions_says_where_llava_lies():
    found = versions.found_versions()
    assert found["transformers"] == transformers.__version__
    assert "1.2.2.post1" in found["llava"]


@pytest.fixture
def complaints(monkeypatch):
    """Lines about deprecated names that transformers logs in the test, each time anew."""
    lines = []
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning, raising=False)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lambda: [line for line in lines if "deprecated" in line]
    logger.removeHandler(handler)


def stock_load(path, **options):
    from llava.model.builder import load_pretrained_model

    options |= {"device": "cpu", "device_map": "cpu"}
    return load_pretrained_model(str(path), None, path.name, **options)[1]


@pytest.mark.parametrize(
    "name", ["llava-1.5-llama", "llava-next-llama-unfrozen", "llava-next-mistral-unfrozen"]
)
@pytest.mark.parametrize("bits", [None, "load_4bit", "load_8bit"])
def test_loading_says_the_dtype_as_this_release_wants(name, bits, checkpoints, complaints):
    if bits is not None and versions.transformers_version() < (4, 46):
        pytest.skip("this transformers refuses to quantise without a GPU")
    if bits is not None:
        pytest.importorskip("bitsandbytes")
    model = stock_load(checkpoints(name), **({} if bits is None else {bits: True}))
    assert model.lm_head.weight.dtype == torch.float16
    assert complaints() == []


def test_a_dtype_that_is_asked_for_is_that_of_the_model(checkpoints, tmp_path, complaints):
    """Whatever the checkpoint's own is; LLaVA's loader asks for float16."""
    folder = shutil.copytree(checkpoints("llava-1.5-llama"), tmp_path / "llava-1.5-float32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert stock_load(folder).dtype == torch.float16
    kind = next(k for k in versions.llava_models() if k.__name__ == "LlavaLlamaForCausalLM")
    for dtype in (torch.float32, torch.bfloat16):
        assert kind.from_pretrained(folder, torch_dtype=dtype).dtype == dtype
    assert complaints() == []


def test_the_training_script_may_set_the_dtype_of_a_config(checkpoints, complaints):
    config = stock_load(checkpoints("llava-1.5-llama")).config
    config.torch_dtype = torch.bfloat16
    assert config.torch_dtype == torch.bfloat16
    assert json.loads(config.to_json_string()).get("dtype", "bfloat16") == "bfloat16"
    assert complaints() == []


def test_the_old_name_of_the_dtype_is_translated_only_where_there_is_a_new_one(monkeypatch):
    half, full = torch.float16, torch.float32
    monkeypatch.setattr(loading, "transformers_version", lambda: (4, 56))
    named = loading._named_now
    assert named({"torch_dtype": half, "a": 1}) == {"dtype": half, "a": 1}
    assert named({"torch_dtype": half, "dtype": None}) == {"dtype": half}
    assert named({"torch_dtype": half, "dtype": full}) == {"dtype": full}
    assert named({"torch_dtype": None}) == {"torch_dtype": None}
    monkeypatch.setattr(loading, "transformers_version", lambda: (4, 55))
    assert named({"torch_dtype": half}) == {"torch_dtype": half}
