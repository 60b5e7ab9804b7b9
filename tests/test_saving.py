"""Pruned models that are saved, loaded and copied."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import load
from evaluation import environment

from llava_hvp import HIVTP, HiPrune, HiPrunePlus, prune, unprune
from llava_hvp.encoder.vit import transformer
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.runtime import Runtime

FRESH = """
import sys, torch
model, ids, pixels, sizes = torch.load(sys.argv[1], weights_only=False)
assert model.llava_hvp.last == []
with torch.no_grad():
    embeds = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, pixels, sizes)[4]
    answer = model.generate(
        ids, images=pixels, image_sizes=sizes, do_sample=False, max_new_tokens=6, min_new_tokens=6)
report = model.llava_hvp.last[0]
import llava_hvp
llava_hvp.unprune(model)
left = sum(len(m._forward_hooks) for m in model.modules())
assert type(model.get_vision_tower()).__name__ == "CLIPVisionTower"
torch.save((report.selection, embeds, answer[:, -6:], left), sys.argv[2])
"""
IN_MODEL_DTYPE = Runtime(tower_dtype="model")
METHODS = {
    "hivtp": HIVTP(r_max=0.25),
    "hiprune": HiPrune(r_max=0.25),
    "hiprune++": HiPrunePlus(r_max=0.25),
}


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llava-1.5-llama", "hivtp"),
        ("llava-1.5-llama", "hiprune++"),
        ("llava-next-llama", "hiprune"),
    ],
)
def test_a_saved_model_prunes_in_another_process(kind, name, checkpoints, photos, tmp_path):
    bundle, photo = load(checkpoints(kind)), photos[0]
    arguments = bundle.ids("What is it?"), bundle.pixels(photo), [photo.size]
    before = hooks(bundle.model)
    runtime = IN_MODEL_DTYPE if name == "hivtp" else None
    with prune(bundle.model, METHODS[name], runtime=runtime) as pruned:
        answer = bundle.generate(*arguments)
        embeds, (report,) = bundle.embeds(*arguments)[0], pruned.last
        torch.save((bundle.model, *arguments), tmp_path / "model.pt")
        assert pruned.last == [report]
    command = [sys.executable, "-c", FRESH, tmp_path / "model.pt", tmp_path / "out.pt"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    selection, *found, left = torch.load(tmp_path / "out.pt", weights_only=False)
    assert torch.equal(selection.keep, report.selection.keep)
    assert selection.roles.keys() == report.selection.roles.keys()
    for mine, theirs in zip((embeds, answer), found, strict=True):
        assert torch.equal(mine, theirs)
    assert left == before


def test_pickled_whole_and_by_its_pruning(checkpoints, photos):
    bundle = load(checkpoints("llava-1.5-llama"))
    arguments = bundle.ids("What is it?"), bundle.pixels(photos[0]), None
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        pruned.on_record = lambda reports: None  # as a process that counts
        expected = bundle.embeds(*arguments)[0]
        by_model = pickle.loads(pickle.dumps(bundle.model))
        by_pruning = pickle.loads(pickle.dumps(pruned)).model
    for model in (by_model, by_pruning):
        bundle.model = model
        assert model.llava_hvp.model is model
        assert torch.equal(bundle.embeds(*arguments)[0], expected)


def test_a_model_of_the_stock_loader_is_saved_pruned(checkpoints, photos):
    builder.install(HIVTP(r_max=0.25))
    try:
        bundle = load(checkpoints("llava-1.5-llama-unfrozen"))
    finally:
        builder.uninstall()
    arguments = bundle.ids("What is it?"), bundle.pixels(photos[0]), None
    file = io.BytesIO()
    torch.save(bundle.model, file)
    expected = bundle.embeds(*arguments)[0]
    file.seek(0)
    bundle.model = torch.load(file, weights_only=False)
    assert torch.equal(bundle.embeds(*arguments)[0], expected)
    assert bundle.model.llava_hvp.last[0].kept_of_patches <= 0.25


def test_a_copy_prunes_by_itself_and_is_counted(own, photos):
    bundle = own("llava-1.5-llama")
    first, seen = bundle.model, []
    first.bfloat16().get_vision_tower().float()
    arguments = bundle.ids("What is it?"), bundle.pixels(photos[0]).bfloat16(), None
    stock = bundle.embeds(*arguments)[0]
    with prune(first, HIVTP(r_max=0.25), runtime=IN_MODEL_DTYPE) as pruned:
        pruned.on_record = seen.append
        expected = bundle.embeds(*arguments)[0]
        copied = copy.deepcopy(first)
    bundle.model = copied
    assert torch.equal(bundle.embeds(*arguments)[0], expected)
    assert seen[-1] is copied.llava_hvp.last
    assert copied.llava_hvp.model is copied
    unprune(copied)
    assert not copied.get_vision_tower().vision_tower._state_dict_hooks
    assert torch.equal(bundle.embeds(*arguments)[0], stock)
    bundle.model = first
    assert torch.equal(bundle.embeds(*arguments)[0], stock)


# --- tower_dtype="model" ---


@pytest.fixture
def mixed(checkpoints, photos):
    """A LLaVA in bfloat16 with its tower in float32, as LLaVA's scripts have it, and its input."""
    bundle = load(checkpoints("llava-1.5-llama-unfrozen"))
    bundle.model.bfloat16().get_vision_tower().float()
    # What bfloat16 cannot hold.
    with torch.no_grad():
        for parameter in bundle.model.get_vision_tower().parameters():
            parameter += 1e-3 * torch.randn(parameter.shape)
    return bundle, (bundle.ids("x"), bundle.pixels(photos[0]).bfloat16(), None)


def saved(model, folder):
    """The weights that `save_pretrained` writes."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def test_the_tower_is_saved_in_its_own_dtype(mixed, tmp_path):
    bundle, arguments = mixed
    stock = saved(bundle.model, tmp_path / "stock")
    state = {k: v.clone() for k, v in bundle.model.state_dict().items()}
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=IN_MODEL_DTYPE):
        bundle.embeds(*arguments)
        tower = bundle.model.get_vision_tower()
        assert tower.dtype == torch.bfloat16
        pruned = saved(bundle.model, tmp_path / "pruned")
        for found, expected in ((pruned, stock), (bundle.model.state_dict(), state)):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), name
        own = tower.vision_tower.state_dict()
        assert {t.dtype for t in own.values() if t.is_floating_point()} == {torch.float32}
        in_use = tower.vision_tower.state_dict(keep_vars=True)
        assert all(in_use[name] is p for name, p in tower.vision_tower.named_parameters())
        assert tower.dtype == torch.bfloat16
    assert not tower.vision_tower._state_dict_hooks
    assert all(torch.equal(v, state[k]) for k, v in bundle.model.state_dict().items())


def test_weights_loaded_into_a_tower_of_other_dtype_stay(mixed):
    bundle, arguments = mixed
    tower = bundle.model.get_vision_tower()
    attention = transformer(tower.vision_tower).encoder.layers[3].self_attn
    with prune(bundle.model, HIVTP(r_max=0.5), runtime=IN_MODEL_DTYPE):
        bundle.embeds(*arguments)
        untouched = attention.k_proj.weight.data.clone()
        with torch.no_grad():
            attention.q_proj.weight.mul_(2)
        doubled = attention.q_proj.weight.data.clone()
        assert torch.equal(attention.state_dict()["q_proj.weight"], doubled)
        state = tower.state_dict()
        name = next(k for k in state if k.endswith("layers.3.self_attn.q_proj.weight"))
        assert torch.equal(state[name], doubled.float())
    assert attention.q_proj.weight.dtype == torch.float32
    assert torch.equal(attention.q_proj.weight, doubled.float())
    assert attention.k_proj.weight.dtype == torch.float32
    assert not torch.equal(attention.k_proj.weight, untouched.float())
    assert torch.equal(attention.k_proj.weight.bfloat16(), untouched)
    assert not isinstance(tower, PrunedCLIPVisionTower)
