"""Asked to prune and unable to: the process ends with an error, and never answers unpruned."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from evaluation import call

ASKED = {"LLAVA_HVP": "--prune-method hivtp --r-max 0.5", "LLAVA_HVP_DEVICE": "cpu"}
CPU = {"LLAVA_HVP_DEVICE": "cpu"}
LOAD = """
from llava.model.builder import load_pretrained_model
_, model, processor, _ = load_pretrained_model({path!r}, None, {name!r})
"""
ENCODE_PAST_US = """
import torch, types
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
tower = CLIPVisionTower({tower!r}, types.SimpleNamespace(mm_vision_select_layer=-2))
print(tower(torch.zeros(2, 3, 112, 112)).shape)
"""
WATCHED = """
from llava.train import train as trainer
stock = trainer.LLaVATrainer.train
def watched(self, *args, **kwargs):
    print("trained with", type(self.model.get_vision_tower()).__name__)
    return stock(self, *args, **kwargs)
trainer.LLaVATrainer.train = watched
train()
"""
TRAIN_BY_HAND = """
import torch
model.float().train()
ids = torch.tensor([[1, -200, 5]])
pixels = torch.zeros(1, 3, 112, 112)
model(input_ids=ids, labels=ids.clamp(min=-100), images=pixels).loss.backward()
print("trained")
"""
DIE = LOAD + "import os; os.kill(os.getpid(), 9)"
TRAIN = (
    "python -m llava.train.train --model_name_or_path {path} --vision_tower {tower} --version v1 "
    "--data_path data.json --image_folder . --output_dir llava-{name} "
    "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False "
    "--image_aspect_ratio pad --bf16 False --max_steps 1 --save_steps 100 --use_cpu True "
    "--per_device_train_batch_size 1 --report_to none "
)


@pytest.fixture(scope="module")
def ended(checkpoints, photos, tmp_path_factory):
    """Each process of this file by its name, at its end."""
    folder = tmp_path_factory.mktemp("fail-closed")
    path = checkpoints("llava-1.5-llama")
    tower = json.loads((path / "config.json").read_text())["mm_vision_tower"]
    words = {"path": str(path), "tower": tower}
    photos[0].save(folder / "photo.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A rocket."}]
    (folder / "data.json").write_text(
        json.dumps([{"id": "0", "image": "photo.png", "conversations": turns}])
    )
    fork_of_llava(folder / "fork")
    (folder / "broken/llava").mkdir(parents=True)
    (folder / "broken/llava/__init__.py").write_text("import a_module_that_is_missing\n")
    for name, code in {
        "past": LOAD.format(**words, name="llava") + ENCODE_PAST_US.format(**words),
        "no-llava": LOAD.format(**words, name="vicuna"),
        "die": DIE.format(**words, name="llava"),
        "trainer": "from llava.train.llava_trainer import LLaVATrainer\n"
        "import llava.train.train\n"
        + LOAD.format(**words, name="llava")
        + "print(type(model.get_vision_tower()).__name__)",
        "own-train": "from llava.train.train import train\n"
        + WATCHED
        + LOAD.format(**words, name="llava")
        + "print(type(model.get_vision_tower()).__name__)",
        "loop": LOAD.format(**words, name="llava") + TRAIN_BY_HAND,
        "import": "import llava\nprint('went on')",
        "score": "import llava.eval.m4c_evaluator\nprint('scored')",
    }.items():
        (folder / f"{name}.py").write_text(code)
    train = TRAIN.format(**words, name="{name}")
    lines = {
        "past": ("python past.py", ASKED),
        "no-llava": ("python no-llava.py", ASKED),
        "die": ("llava-hvp run --prune-method hivtp -- bash -c 'python die.py; echo scored'", {}),
        "fork": ("python import.py", {**ASKED, "PYTHONPATH": first_on_path(folder / "fork")}),
        "broken": ("python import.py", {**ASKED, "PYTHONPATH": first_on_path(folder / "broken")}),
        "score": ("python score.py", ASKED),
        "sglang": ("python -m llava.serve.sglang_worker", ASKED),
        "train-flags": (train.format(name="x") + "--prune-method hivtp", {}),
        "trainer": ("python trainer.py", ASKED),
        "own-train": (
            train.format(name="own").replace("-m llava.train.train", "own-train.py"),
            ASKED,
        ),
        "loop": ("python loop.py", ASKED),
        "loop-asked": (
            "python loop.py",
            {**ASKED, "LLAVA_HVP": ASKED["LLAVA_HVP"] + " --prune-train"},
        ),
        "loop-launched": (
            "llava-hvp run --prune-method hivtp -- python loop.py; echo code $?",
            {"LLAVA_HVP_DEVICE": "cpu"},
        ),
        "train-asked": (train.format(name="asked"), ASKED),
        "train-none": (train.format(name="none") + "--prune-method none --r-max 0.25", CPU),
        "train-pruned": (
            train.format(name="pruned") + "--prune-train --prune-method hivtp --r-max 0.25",
            CPU,
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda one: call(one[0], folder, **one[1]), lines.values())
        return dict(zip(lines, ends, strict=True))


def first_on_path(folder: Path) -> str:
    """PYTHONPATH with a folder before what it has."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def fork_of_llava(folder: Path) -> None:
    """A LLaVA whose method takes one argument more, as LLaVA-NeXT's repository has it."""
    source = Path(next(iter(find_spec("llava").submodule_search_locations)))
    shutil.copytree(source, folder / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    arch = folder / "llava/model/llava_arch.py"
    stock = "images, image_sizes=None\n"
    assert stock in arch.read_text()
    arch.write_text(arch.read_text().replace(stock, 'images, image_sizes=None, modalities=["x"]\n'))


def refused(result, message, code=1):
    """Whether a process ended with an error of ours as its last line."""
    assert result.returncode == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("llava-hvp: error: "), result.stderr
    assert message in last
    return True


def test_images_encoded_past_us_are_an_error_at_exit(ended):
    assert ended["past"].stdout == "torch.Size([2, 64, 64])\n"
    assert refused(ended["past"], "2 images were encoded without pruning")


def test_a_model_that_is_no_llava_is_refused_when_it_is_loaded(ended):
    assert refused(ended["no-llava"], "names without `llava` in them")


def test_an_unknown_llava_is_refused(ended):
    assert refused(ended["fork"], "modalities")
    assert "went on" not in ended["fork"].stdout


def test_the_reason_is_told_where_llava_does_not_import(ended):
    assert refused(ended["broken"], "No module named 'a_module_that_is_missing'")


def test_a_killed_child_fails_the_run_though_the_script_went_on(ended):
    assert "scored" in ended["die"].stdout
    assert refused(ended["die"], "die.py (process ")
    assert "did not finish pruned: it was killed" in ended["die"].stderr


def test_a_script_that_only_scores_is_left_in_peace(ended):
    assert (ended["score"].returncode, ended["score"].stdout) == (0, "scored\n")
    assert "llava-hvp" not in ended["score"].stderr


def test_sglang_is_refused(ended):
    assert refused(ended["sglang"], "use llava.serve.model_worker")


def test_importing_the_trainer_is_no_training(ended):
    loaded = ended["trainer"]
    assert (loaded.returncode, loaded.stdout) == (0, "PrunedCLIPVisionTower\n"), loaded.stderr
    assert "pruning on" in loaded.stderr


def test_a_script_that_calls_llavas_train_trains_unpruned_and_goes_on_pruned(ended):
    result = ended["own-train"]
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith("Tower")] == [
        "trained with CLIPVisionTower",
        "PrunedCLIPVisionTower",
    ]
    ours = [line for line in result.stderr.splitlines() if line.startswith("llava-hvp: ")]
    assert ours[0] == "llava-hvp: training stays unpruned: give --prune-train to prune it too"
    assert ours[1].startswith("llava-hvp: pruning on")


def test_a_pruned_model_is_not_trained_without_the_flag(ended):
    assert ended["loop"].returncode == 1
    assert "trained" not in ended["loop"].stdout
    assert "error: a pruned model is being trained" in ended["loop"].stderr
    assert "--prune-train" in ended["loop"].stderr
    assert ended["loop-launched"].stdout == "code 1\n"
    asked = ended["loop-asked"]
    assert (asked.returncode, asked.stdout) == (0, "trained\n"), asked.stderr
    assert "1 image, kept 50.0% of stock's visual tokens" in asked.stderr


def test_training_is_pruned_only_by_its_own_flag(ended):
    assert refused(ended["train-flags"], "--prune-train", code=2)
    asked = ended["train-asked"]
    assert asked.returncode == 0, asked.stderr
    assert "training stays unpruned: give --prune-train" in asked.stderr
    assert "pruning on" not in asked.stderr
    pruned = ended["train-pruned"]
    assert pruned.returncode == 0, pruned.stderr
    assert "pruning on: hivtp r_max=0.25" in pruned.stderr
    assert "1 image, kept 25.0% of stock's visual tokens" in pruned.stderr
    assert "'train_loss'" in pruned.stdout


def test_none_in_training_is_training_as_ever_with_an_account(ended):
    none = ended["train-none"]
    assert none.returncode == 0, none.stderr
    assert "pruning off (none)" in none.stderr
    assert "images encoded unpruned: 1\n" in none.stderr
    assert "stays unpruned" not in none.stderr
    assert "'train_loss'" in none.stdout
