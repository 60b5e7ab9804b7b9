"""`patches/`: for those who keep a LLaVA checkout; tried on a copy of the installed one."""

import ast
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_hvp.hosts.llava.compat.versions import transformers_version

FOLDER = Path(__file__).parents[1] / "patches"
PATCHES = {path.stem: path for path in sorted(FOLDER.glob("*.patch"))}
VERSION = transformers_version()
QUESTION = "What is this?"

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")

# What a stock evaluation script says without one of them, on the CPU.
NEEDED = {"0007-device": "CUDA|NVIDIA"}
if (4, 38) <= VERSION < (5, 0):
    NEEDED["0002-generation"] = "unexpected keyword argument 'cache_position'"
if VERSION >= (5, 0):
    NEEDED["0004-tower-in-checkpoint"] = "meta device"


def installed() -> Path:
    return Path(next(iter(importlib.util.find_spec("llava").submodule_search_locations)))


def applicable() -> dict[str, Path]:
    """Without those that name the other of the two LLaVAs."""
    is_github = "CLIPVisionTowerS2" in sources(installed())["model/multimodal_encoder/builder.py"]
    other = "(PyPI) only" if is_github else "(GitHub) only"
    return {name: path for name, path in PATCHES.items() if other not in header(path)}


def header(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n--- a/")[0]


def sources(package: Path) -> dict[str, str]:
    """The text of every file by its path in the package."""
    files = sorted(package.rglob("*.py"))
    return {str(f.relative_to(package)): f.read_text(encoding="utf-8") for f in files}


def touched(path: Path) -> set[str]:
    return set(re.findall(r"^\+\+\+ b/llava/(.+)$", path.read_text(encoding="utf-8"), re.M))


def apply(checkout: Path, *paths: Path, flags: tuple[str, ...] = ()) -> None:
    # Inside a repository, git would skip paths that are not the repository's, and say nothing.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    result = subprocess.run(
        ["git", "apply", *flags, *map(str, paths)],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def copy(folder: Path, *paths: Path) -> Path:
    """The installed llava with these patches; returns the folder that holds it."""
    shutil.copytree(installed(), folder / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    if paths:
        apply(folder, *paths)
    return folder


def run(
    checkout: Path, *arguments: str, stdin: str = "", **environ: str
) -> subprocess.CompletedProcess:
    """Python on a checkout, without a GPU, our hook switched off."""
    path = (str(checkout), os.environ.get("PYTHONPATH"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LLAVA_HVP_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_says_against_what_why_and_until_when(name):
    statements = re.findall(r"^(\w+): ", header(PATCHES[name]), re.M)
    assert statements == ["Against", "Why", "Drop"]
    assert re.fullmatch(r"\d{4}-[a-z-]+", name)


def test_the_numbers_are_unique():
    numbers = [name[:4] for name in PATCHES]
    assert numbers
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_applies_alone_and_backwards(name, tmp_path):
    if name not in applicable():
        pytest.skip("is for the other LLaVA")
    before = sources(installed())
    folder = copy(tmp_path, PATCHES[name])
    after = sources(folder / "llava")
    changed = {file for file in before | after if before.get(file) != after.get(file)}
    assert changed == touched(PATCHES[name])
    for file in changed:
        compile(after[file], file, "exec")
    apply(folder, PATCHES[name], flags=("--reverse",))
    assert sources(folder / "llava") == before


def test_all_together_in_any_order(tmp_path):
    paths = list(applicable().values())
    forwards = sources(copy(tmp_path / "forwards", *paths) / "llava")
    backwards = sources(copy(tmp_path / "backwards", *reversed(paths)) / "llava")
    assert forwards == backwards
    before = sources(installed())
    changed = {file for file in before | forwards if before.get(file) != forwards[file]}
    assert changed == set().union(*map(touched, paths))


@pytest.fixture
def evaluate(checkpoints, photos, tmp_path):
    """A function that runs a stock evaluation script with patches: (finished process, answer)."""

    def start(*paths: Path, ours: tuple[str, ...] = (), **environ: str):
        photos[0].save(tmp_path / "photo.png")
        question = {"question_id": 0, "image": "photo.png", "text": QUESTION}
        (tmp_path / "questions.jsonl").write_text(json.dumps(question))
        answers = tmp_path / "answers.jsonl"
        given = {
            "model-path": checkpoints("llava-next-llama-unfrozen"),
            "image-folder": tmp_path,
            "question-file": tmp_path / "questions.jsonl",
            "answers-file": answers,
            "conv-mode": "vicuna_v1",
            "temperature": 0,
            "max_new_tokens": 6,
        }
        flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        process = run(
            copy(tmp_path / "checkout", *paths),
            *("-m", "llava.eval.model_vqa_loader", *flags, *ours),
            **environ,
        )
        text = json.loads(answers.read_text())["text"] if process.returncode == 0 else None
        return process, text

    return start


def test_a_stock_command_runs_with_the_patches_alone(evaluate, checkpoints, photos):
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    process, text = evaluate(*applicable().values())
    assert process.returncode == 0, process.stderr

    # The same by our bridges at run time, in this process.
    path = checkpoints("llava-next-llama-unfrozen")
    tokenizer, model, processor, _ = load_pretrained_model(str(path), None, path.name)
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        f"{QUESTION} ASSISTANT:"
    )
    images = process_images([photos[0]], processor, model.config).half()
    with torch.inference_mode():
        output = model.generate(
            tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
            images=images,
            image_sizes=[photos[0].size],
            do_sample=False,
            max_new_tokens=6,
        )
    assert text == tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip() != ""


def test_a_patched_command_prunes_with_the_hook_switched_off(evaluate, tmp_path):
    flags = ("--device", "cpu", "--prune-method", "hivtp", "--r-max", "0.25")
    process, text = evaluate(PATCHES["0001-entry-point"], ours=flags)
    assert process.returncode == 0, process.stderr
    assert text
    assert "pruning on: hivtp r_max=0.25" in process.stderr
    counts = json.loads((tmp_path / "answers.jsonl.hvp.json").read_text())["counts"]
    assert counts["images"] == 1
    assert 0 < counts["mean_kept_of_patches"] <= 0.25


def test_a_patched_command_runs_unpruned_with_an_account(evaluate, tmp_path):
    flags = ("--device", "cpu", "--prune-method", "none", "--r-max", "0.25")
    process, text = evaluate(PATCHES["0001-entry-point"], ours=flags)
    assert process.returncode == 0, process.stderr
    assert text
    record = json.loads((tmp_path / "answers.jsonl.hvp.json").read_text())
    assert (record["method"], record["counts"]["images"]) == ("none", 1)
    assert record["counts"]["mean_kept_of_stock"] == 1


def test_a_patched_command_that_is_refused_says_why_and_leaves_the_answers(evaluate, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("{}\n")
    asked = f"--device cpu --prune-method none --prune-reports {tmp_path}"
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process, _ = evaluate(PATCHES["0001-entry-point"], LLAVA_HVP=asked)
    assert process.returncode == 1
    assert "another run is writing these answers" in process.stderr.splitlines()[-1]
    assert path.read_text() == "{}\n"
    (report,) = [json.loads(found.read_text()) for found in tmp_path.glob("[0-9]*.json")]
    assert report["state"] == "failed"
    assert "another run is writing these answers" in report["reason"]


def test_a_patched_command_refuses_a_typo(evaluate):
    process, _ = evaluate(PATCHES["0001-entry-point"], ours=("--prune-method", "hivtpp"))
    assert process.returncode == 2
    assert "llava-hvp: error: unknown method 'hivtpp'" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", NEEDED)
def test_the_command_fails_without(name, evaluate):
    others = {n: path for n, path in applicable().items() if n != name}
    process, _ = evaluate(*others.values())
    assert process.returncode != 0
    assert re.search(NEEDED[name], process.stderr), process.stderr


@pytest.fixture(scope="module")
def driven(checkpoints, photos, tmp_path_factory):
    """What DRIVER printed by section, in one process with all patches."""
    unfrozen = checkpoints("llava-next-llama-unfrozen")
    folder = tmp_path_factory.mktemp("driven")
    path = folder / "llava-v1.5"
    shutil.copytree(checkpoints("llava-1.5-llama"), path)
    # The config promises a tower that the checkpoint does not hold.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": True}))
    photos[0].save(folder / "photo.png")
    turns = [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": "A rocket."},
    ]
    row = {"id": "0", "image": "photo.png", "conversations": turns}
    (folder / "data.json").write_text(json.dumps([row]))
    (folder / "driver.py").write_text(DRIVER)
    checkout = copy(folder / "checkout", *applicable().values())
    process = run(
        checkout,
        *(str(folder / "driver.py"), str(folder), config["mm_vision_tower"], str(unfrozen)),
        stdin=f"{QUESTION}\nAnd why?\n\n",
    )
    assert process.returncode == 0, process.stderr
    return dict(re.findall(r"^<(\w+)>\n(.*?)^</\1>$", process.stdout, re.M | re.S))


# Sections do not stop one another; a fault is printed where its test looks.
DRIVER = """
import contextlib, runpy, sys, traceback
from pathlib import Path
import torch
from transformers import CLIPVisionModel
from llava.model import builder

folder, tower, unfrozen = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
path = str(folder / "llava-v1.5")
load, models = builder.load_pretrained_model, []

def loading(*args, **kwargs):
    models.append(load(*args, **kwargs))
    return models[-1]

@contextlib.contextmanager
def section(name):
    print(f"<{name}>", flush=True)
    try:
        yield
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    print(f"\\n</{name}>", flush=True)

with section("chat"):
    builder.load_pretrained_model = loading
    sys.argv = ["cli.py", "--model-path", path, "--image-file", str(folder / "photo.png")]
    sys.argv += ["--device", "cpu", "--temperature", "0", "--max-new-tokens", "6", "--debug"]
    runpy.run_module("llava.serve.cli", run_name="__main__")
    builder.load_pretrained_model = load
with section("tower"):
    own = CLIPVisionModel.from_pretrained(tower).half().state_dict()
    loaded = models[0][1].get_vision_tower().vision_tower.state_dict()
    assert own.keys() == loaded.keys()
    print("equal:", all(torch.equal(own[name], loaded[name]) for name in own))
    # As a LoRA's non_lora_trainables.bin names them.
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    models[0][1].load_state_dict({name: torch.full_like(own[min(own)], 7)}, strict=False)
    print("trained:", any((weight == 7).all() for weight in loaded.values()))
with section("quantized"):
    model = load(unfrozen, None, "llava", load_4bit=True, device="cpu")[1]
    print(type(model.model.layers[0].mlp.up_proj).__name__)
with section("training"):
    sys.argv = ["train.py", "--model_name_or_path", path, "--vision_tower", tower]
    sys.argv += ["--version", "v1", "--data_path", str(folder / "data.json")]
    sys.argv += ["--image_folder", str(folder), "--output_dir", str(folder / "llava-trained")]
    sys.argv += ["--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2"]
    sys.argv += ["--mm_use_im_patch_token", "False", "--tune_mm_mlp_adapter", "True"]
    sys.argv += ["--max_steps", "1", "--save_steps", "1", "--use_cpu", "True"]
    sys.argv += ["--report_to", "none"]
    runpy.run_module("llava.train.train", run_name="__main__")
    print(sorted(torch.load(folder / "llava-trained/mm_projector.bin")))
"""


def test_the_chat_remembers(driven):
    turns = re.findall(r"^ (\{'prompt': .*\}) $", driven["chat"], re.M)
    assert len(turns) == 2, driven["chat"]
    first, second = (ast.literal_eval(turn) for turn in turns)
    assert first["outputs"]
    assert first["outputs"] in second["prompt"]


def test_a_tower_is_never_random(driven):
    assert "equal: True\ntrained: True\n" in driven["tower"], driven["tower"]


@pytest.mark.skipif(VERSION < (4, 57), reason="older ones refuse 4 bit on the CPU")
def test_four_bit(driven):
    pytest.importorskip("bitsandbytes")
    assert "Linear4bit" in driven["quantized"], driven["quantized"]


@pytest.mark.skipif(VERSION < (4, 46), reason="runs with its own accelerate and peft only")
def test_training(driven):
    names = [f"model.mm_projector.{i}.{name}" for i in (0, 2) for name in ("bias", "weight")]
    assert str(names) in driven["training"], driven["training"]


def test_a_keyword_stops_whatever_it_is_tokenized_with(tmp_path, loaded):
    path = copy(tmp_path, applicable()["0006-stopping-criteria"]) / "llava/mm_utils.py"
    spec = importlib.util.spec_from_file_location("patched_mm_utils", path)
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    from llava import mm_utils

    tokenizer = loaded("llava-1.5-llama").tokenizer
    prompt = torch.arange(50)[None]
    new = tokenizer("This is red", add_special_tokens=False, return_tensors="pt").input_ids
    keyword = "s red"  # part of tokens only
    assert not mm_utils.KeywordsStoppingCriteria([keyword], tokenizer, prompt)(new, None)
    assert patched.KeywordsStoppingCriteria([keyword], tokenizer, prompt)(new, None)
    assert not patched.KeywordsStoppingCriteria(["blue"], tokenizer, prompt)(new, None)
