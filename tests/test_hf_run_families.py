"""Scripts with transformers' LLaVA-OneVision and Qwen2.5-VL, pruned or ended by an error."""

import ast
import contextlib
import os
import sys

import hf_families as tiny
import pytest
import torch
from evaluation import call
from hf_models import needs_release

from llava_hvp import HIVTP, prune
from llava_hvp.hosts.hf import host, loading
from llava_hvp.pruning.monkeypatch import MonkeyPatcher

pytestmark = needs_release

FLAGS = "--prune-method hivtp --r-max 0.5"
START = """
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
models = dict(onevision=AutoModelForImageTextToText, qwen=Qwen2_5_VLForConditionalGeneration)
load = lambda name: models[name].from_pretrained(name, dtype=torch.float32).eval()
inputs = {name: torch.load(f"{name}.pt") for name in models}

def ask(name, model, **given):
    given = dict(inputs[name], do_sample=False, max_new_tokens=6, min_new_tokens=6, **given)
    ids = model.generate(**given)
    return ids[:, given["input_ids"].shape[1]:].tolist()
"""
ASK = START + "print([ask(name, load(name)) for name in models])\n"
# A fork that would encode unpruned ends at once: one process tries all of them.
FORKS = """
import os

def ended(step):
    child = os.fork()
    if child == 0:
        try:
            step()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

loaded = {name: load(name) for name in models}
built = {name: type(model)(model.config) for name, model in loaded.items()}
for name, model in loaded.items():
    built[name].load_state_dict(model.state_dict())
videos, grids = torch.zeros(1, 2, 3, 112, 112), torch.tensor([[1, 4, 4]])
steps = dict(
    onevision=lambda: ask("onevision", built["onevision"]),
    qwen=lambda: ask("qwen", built["qwen"]),
    inside=lambda: built["qwen"].model(**inputs["qwen"]),
    refused=lambda: ask("onevision", loaded["onevision"], pixel_values_videos=videos),
    features=lambda: loaded["onevision"].model.get_video_features(videos),
    video=lambda: built["onevision"].get_video_features(videos),
    frames=lambda: built["qwen"].get_video_features(torch.zeros(16, 1176), grids),
    pruned=lambda: ask("qwen", loaded["qwen"]),
)
print({name: ended(step) for name, step in steps.items()})
"""


@pytest.fixture(scope="module")
def inputs():
    return {
        "onevision": tiny.pictures([([(150, 400)], 5), ([(100, 100)], 2)]),
        "qwen": tiny.grids([([(4, 6)], 5), ([(6, 8)], 3)]),
    }


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    """Both models saved, and what they are asked."""
    folder = tmp_path_factory.mktemp("families")
    for name, make in {"onevision": tiny.onevision, "qwen": tiny.qwen}.items():
        make().save_pretrained(folder / name)
        torch.save(inputs[name], folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """As a script loads them: a config changes a little by being saved."""
    from transformers import AutoModelForImageTextToText as Auto

    kinds = ("onevision", "qwen")
    return {n: Auto.from_pretrained(folder / n, dtype=torch.float32).eval() for n in kinds}


def script(folder, code, flags):
    """Under the launcher, in an environment whose `llava` cannot be imported."""
    (folder / "script.py").write_text(code)
    (folder / "llava.py").write_text("import os\nos._exit(77)\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return call(f"llava-hvp run {flags} -- python script.py", folder, PYTHONPATH=path)


def test_both_are_pruned_by_the_flags(folder, models, inputs):
    expected, kept, stock = [], 0, 0
    for name, model in models.items():
        with prune(model, HIVTP(r_max=0.5)) as pruned:
            expected.append(tiny.generate(model, inputs[name]).tolist())
            kept += sum(report.kept_of_stock for report in pruned.last)
            stock += len(pruned.last)
    result = script(folder, ASK, FLAGS)
    assert result.returncode == 0, result.stderr
    assert ast.literal_eval(result.stdout) == expected
    lines = [line for line in result.stderr.splitlines() if line.startswith("llava-hvp: ")]
    assert lines[0].startswith("llava-hvp: pruning on: hivtp r_max=0.5 (llava-hvp ")
    assert f"4 images, kept {kept / stock:.1%} of stock's visual tokens" in lines[-1]


def test_unpruned_images_are_counted(models, inputs):
    counted = []
    patches = MonkeyPatcher()
    with contextlib.ExitStack() as stack:
        stack.callback(patches.undo)
        for model in models.values():
            loading.install(
                patches,
                sys.modules[type(model).__module__],
                None,
                before=pytest.fail,
                on_model=pytest.fail,
                on_unpruned=pytest.fail,
                on_images=lambda *told: counted.append(told),
            )
        for name, model in models.items():
            tiny.logits(model, inputs[name])
    tokens = [int((inputs[name]["input_ids"] == tiny.IMAGE).sum()) for name in models]
    assert counted == [(models[n].model, 2, t) for n, t in zip(models, tokens, strict=True)]
    facts = [host.facts_of(model) for model, *_ in counted]
    assert facts == [{"vision_tower_dtype": "float32", "vision_tower_attention": "sdpa"}] * 2


def test_what_would_run_unpruned_and_every_video_ends_with_an_error(folder):
    result = script(folder, START + FORKS, FLAGS)
    *said, ends = result.stdout.splitlines()
    assert ast.literal_eval(ends) == {
        "onevision": 3,
        "qwen": 3,
        "inside": 3,
        "refused": 3,
        "features": 3,
        "video": 3,
        "frames": 3,
        "pruned": 0,
    }, result.stderr
    images, videos = said[:3], said[3:]
    assert all("images would be encoded without pruning" in line for line in images)
    assert all("give the frames as images" in line for line in videos), videos
    assert len(videos) == 4
