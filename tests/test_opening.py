"""One opener and one conversation template for every command, both as LLaVA's own."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llava.conversation import conv_templates
from llava.eval import run_llava
from llava.mm_utils import get_model_name_from_path
from llava.model import builder as stock
from llava.serve import cli

from llava_hvp.bench import subject
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.config import Request
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.job import Job

# Published checkpoints, and one that LLaVA's trainer left.
NAMES = {
    "liuhaotian/llava-v1.5-7b": "vicuna_v1",
    "liuhaotian/llava-v1.5-13b-lora": "vicuna_v1",
    "liuhaotian/llava-v1.6-vicuna-7b": "vicuna_v1",
    "liuhaotian/llava-v1.6-mistral-7b": "mistral_instruct",
    "liuhaotian/llava-v1.6-34b": "chatml_direct",
    "liuhaotian/llava-llama-2-13b-chat-lightning-preview": "llava_llama_2",
    "liuhaotian/llava-llama-2-7b-chat-lightning-lora-preview": "llava_llama_2",
    "liuhaotian/llava-v1-0719-336px-lora-vicuna-13b-v1.3": "vicuna_v1",
    "liuhaotian/LLaVA-Lightning-7B-delta-v1-1": "vicuna_v1",
    "liuhaotian/LLaVA-Lightning-MPT-7B-preview": "mpt",
    "liuhaotian/LLaVA-13b-delta-v0": "llava_v0",
    "checkpoints/llava-v1.5-7b/checkpoint-500": "vicuna_v1",
    "shapes/llava-shapes": "llava_v0",
}


class Chosen(Exception):  # noqa: N818 - no error
    """LLaVA has chosen its template."""


def stop(*args):
    raise Chosen


def chosen(run, path):
    """The template that a command of LLaVA's takes for a path when it is given none."""
    others = ("model_base", "load_8bit", "load_4bit", "conv_mode", "device", "image_file")
    given = argparse.Namespace(model_path=path, query="?", **dict.fromkeys(others))
    with pytest.raises(Chosen):
        run(given)
    return given.conv_mode


@pytest.fixture(autouse=True)
def _layers_begin_with_weights(monkeypatch):
    """LLaVA's commands make torch leave new layers as the memory was; not past these tests."""
    for kind in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(kind, "reset_parameters", kind.reset_parameters)


@pytest.fixture
def without_weights(monkeypatch):
    """LLaVA's commands load nothing, and stop where they open the picture."""
    model = argparse.Namespace(config=argparse.Namespace(mm_use_im_start_end=False))
    for module in (cli, run_llava):
        monkeypatch.setattr(module, "load_pretrained_model", lambda *_, **__: (None, model, 0, 0))
    monkeypatch.setattr(cli, "load_image", stop)
    monkeypatch.setattr(run_llava, "image_parser", stop)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("path", NAMES)
def test_the_template_is_the_one_that_llava_chooses(path):
    mine = default_template(get_model_name_from_path(path))
    chat = chosen(cli.main, path)
    assert chosen(run_llava.eval_model, path) == chat
    # Their scripts for benchmarks pass the other of the two for v1.
    assert mine == {"llava_v1": "vicuna_v1"}.get(chat, chat) == NAMES[path]
    assert mine in conv_templates


def test_the_two_templates_for_v1_differ_in_one_word():
    ours, chat = (conv_templates[name].copy().system for name in ("vicuna_v1", "llava_v1"))
    assert ours != chat
    assert ours.replace("user", "human") == chat


@pytest.mark.parametrize("path", NAMES)
def test_eval_passes_that_template(path):
    job = Job(get_benchmark("pope"), path, Request(), Path("data"), Path("out"))
    flags = job.flags.rest
    assert flags[flags.index("--conv-mode") + 1] == NAMES[path]
    asked = replace(job, stock=("--conv-mode", "v9")).flags.rest
    assert asked.count("--conv-mode") == 1
    assert asked[asked.index("--conv-mode") + 1] == "v9"


def test_every_opener_asks_in_that_template(checkpoints, tmp_path):
    path = str(shutil.copytree(checkpoints("llava-1.5-llama"), tmp_path / "llava-llama-2-tiny"))
    opened = open_checkpoint(path, "cpu")
    assert opened.conv_mode == "llava_llama_2"
    talk = conv_templates["llava_llama_2"].copy()
    talk.append_message(talk.roles[0], "<image>\nWhy?")
    talk.append_message(talk.roles[1], None)
    assert opened.text("Why?") == talk.get_prompt()
    assert opened.text("<image> and <image>?", 2).count("<image>") == 2
    ids = opened.prompt("Why?")
    assert torch.equal(Viewer.load(path, None, "cpu", bits=None).prompt("Why?")[0], ids)
    given = {"bits": None, "question": "Why?"}
    measured = subject.of_checkpoint(path, None, "cpu", torch.float32, conv_mode=None, **given)
    assert torch.equal(measured.prompt, ids)
    asked = subject.of_checkpoint(path, None, "cpu", torch.float32, conv_mode="mpt", **given)
    assert not torch.equal(asked.prompt, ids)


def test_an_unknown_template_is_refused_before_a_model_is_loaded(checkpoints, monkeypatch):
    monkeypatch.setattr(stock, "load_pretrained_model", stop)
    with pytest.raises(OptionError, match=r"--conv-mode v9: LLaVA knows .*vicuna_v1"):
        open_checkpoint(str(checkpoints("llava-1.5-llama")), "cpu", conv_mode="v9")


# --- dtypes and devices ---


def dtypes(checkpoint):
    """Of the language model, the projector, the tower and the images."""
    model = checkpoint.model
    projector = model.get_model().mm_projector[0].weight.dtype
    return model.dtype, projector, model.get_vision_tower().dtype, checkpoint.dtype


@pytest.mark.parametrize("name", ["llava-1.5-llama", "llava-next-llama-unfrozen"])
def test_on_a_cpu_everything_is_float32_unless_asked(checkpoints, name):
    path = str(checkpoints(name))
    assert dtypes(open_checkpoint(path, "cpu")) == (torch.float32,) * 4
    for dtype in (torch.float16, torch.bfloat16):
        assert dtypes(open_checkpoint(path, "cpu", dtype=dtype)) == (dtype,) * 4


def test_a_tower_that_llava_leaves_in_float32_stays_so(checkpoints, monkeypatch):
    load = stock.load_pretrained_model

    def on_several_gpus(*args, **kwargs):
        found = load(*args, **kwargs)
        found[1].get_vision_tower().float()
        return found

    monkeypatch.setattr(stock, "load_pretrained_model", on_several_gpus)
    found = open_checkpoint(str(checkpoints("llava-1.5-llama")), "cpu", dtype=torch.bfloat16)
    assert dtypes(found) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "device_map", "reaches"),
    [
        ("cuda", None, "auto"),
        ("cuda:1", None, "cuda:1"),
        ("cuda:0", "auto", "auto"),
        ("cpu", None, {"": "cpu"}),
        ("cpu", "auto", {"": "cpu"}),
    ],
)
def test_the_device_map_reaches_the_models_own_loader(
    checkpoints, monkeypatch, device, device_map, reaches
):
    seen = {}

    class Recorder:
        @staticmethod
        def from_pretrained(path, **kwargs):
            seen.update(kwargs)
            raise Chosen("seen")

    monkeypatch.setattr(stock, "LlavaLlamaForCausalLM", Recorder)
    path = str(checkpoints("llava-1.5-llama"))
    with pytest.raises(OptionError, match="LLaVA cannot load it: seen"):
        open_checkpoint(path, device, device_map=device_map)
    assert seen["device_map"] == reaches
    assert seen["torch_dtype"] == torch.float16
