"""One step of the stock trainer, `llava.train.train`, on a tiny checkpoint."""

import functools
import importlib
import json
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from llava_hvp import HIVTP
from llava_hvp.errors import OptionError
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.compat.arguments import named_now, on_cpu
from llava_hvp.hosts.llava.compat.deepspeed import check_saving
from llava_hvp.hosts.llava.compat.training import bridge_training
from llava_hvp.hosts.llava.compat.versions import llava_models, transformers_version
from llava_hvp.pruning.monkeypatch import MonkeyPatcher

METHOD = HIVTP(r_max=0.5)
ANSWERS = ("A rocket and a tower.", "A cup.")


@pytest.fixture
def bridged_training():
    pytest.importorskip("accelerate")
    patches = MonkeyPatcher()
    bridge_training(patches)
    yield
    patches.undo()


@pytest.fixture
def installed():
    builder.install(METHOD)
    yield
    builder.uninstall()


@pytest.fixture
def data(tmp_path, photos):
    """A folder with two photos and LLaVA's training file of them."""
    rows = []
    for index, answer in enumerate(ANSWERS):
        photos[index].save(tmp_path / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def train(checkpoints, data, monkeypatch, bridged_training):
    """A function that trains one step by the stock script; returns (trainer, seen).

    `seen` is what the language model's forward got, `trainer.before` the projector's weights
    before the step.
    """
    from llava import conversation
    from transformers import LlamaForCausalLM

    script = importlib.import_module("llava.train.train")
    trainers, seen = [], []

    class Kept(script.LLaVATrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = [p.detach().clone() for p in projector(self.model).parameters()]
            trainers.append(self)

    stock = LlamaForCausalLM.forward

    @functools.wraps(stock)
    def forward(self, **kwargs):
        seen.append(kwargs)
        return stock(self, **kwargs)

    def run(*flags):
        checkpoint = checkpoints("llava-1.5-llama")
        tower = json.loads((checkpoint / "config.json").read_text())["mm_vision_tower"]
        given = {
            "model_name_or_path": checkpoint,
            "vision_tower": tower,
            "version": "v1",
            "data_path": data / "data.json",
            "image_folder": data,
            "image_aspect_ratio": "pad",
            "output_dir": data / "llava-trained",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_patch_token": False,
            "model_max_length": 2048,
            "max_steps": 1,
            "per_device_train_batch_size": len(ANSWERS),
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
        }
        argv = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv, *flags])
        monkeypatch.setattr(conversation, "default_conversation", conversation.conv_vicuna_v1)
        monkeypatch.setattr(script, "LLaVATrainer", Kept)
        # transformers leaves the precision asked for in the environment.
        with monkeypatch.context() as recording, mock.patch.dict("os.environ"):
            recording.setattr(LlamaForCausalLM, "forward", forward)
            script.train()
        return trainers[-1], seen[-1]

    yield run
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def projector(model):
    return model.get_model().mm_projector


def assert_trained(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(losses) == 1
    assert math.isfinite(losses[0])
    after = list(projector(trainer.model).parameters())
    assert all(p.dtype == torch.float32 for p in after)
    assert all(not torch.equal(a, b) for a, b in zip(trainer.before, after, strict=True))


def assert_rows(trainer, seen, visual):
    """Each row of the batch has its `visual` tokens, its labels, and no label elsewhere."""
    embeds, mask, labels = seen["inputs_embeds"], seen["attention_mask"], seen["labels"]
    samples = sorted(trainer.train_dataset, key=lambda sample: len(sample["input_ids"]))
    rows = mask.sum(1).argsort()
    assert embeds.shape[:2] == mask.shape == labels.shape
    assert embeds.shape[1] == mask.sum(1).max()
    for row, sample in zip(rows, samples, strict=True):
        assert mask[row].sum() == len(sample["input_ids"]) - 1 + visual
        at = int((sample["input_ids"] == -200).nonzero())
        ignored = torch.full((visual,), -100)
        expected = torch.cat([sample["labels"][:at], ignored, sample["labels"][at + 1 :]])
        assert (expected != -100).any()
        assert torch.equal(labels[row][mask[row]], expected)
        assert (labels[row][~mask[row]] == -100).all()


def test_a_step_of_the_whole_model(train, installed, photos, data):
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    # A checkpoint is saved, sampler and optimizer take the branches of stock's fine-tuning.
    trainer, seen = train(
        *("--save_strategy", "steps", "--save_steps", "1"),
        *("--mm_projector_lr", "2e-3", "--group_by_modality_length", "True"),
    )
    assert_trained(trainer)
    model = trainer.model
    training = [report.kept_tokens for report in model.llava_hvp.last]
    assert training == [32, 32]
    assert_rows(trainer, seen, visual=32)
    tower = model.get_vision_tower()
    assert not any(p.requires_grad for p in tower.parameters())

    # What it saved is loaded by the stock loader, and inference keeps as many.
    _, loaded, processor, _ = load_pretrained_model(
        str(data / "llava-trained"), None, "llava-trained", device="cpu", device_map="cpu"
    )
    saved, trained = (list(projector(m).parameters()) for m in (loaded, model))
    assert all(torch.equal(a, b.half()) for a, b in zip(saved, trained, strict=True))
    for photo in photos[: len(ANSWERS)]:
        images = process_images([photo], processor, loaded.config).half()
        with torch.no_grad():
            ids = torch.tensor([[1, -200, 5]])
            loaded.generate(ids, images=images, image_sizes=[photo.size], max_new_tokens=1)
        assert [report.kept_tokens for report in loaded.llava_hvp.last] == [32]


def test_a_step_of_the_projector_alone(train, installed, data, monkeypatch):
    # Stock imports deepspeed for saving an adapter, whether or not it is used.
    monkeypatch.setattr(
        "llava.train.train.maybe_zero_3", lambda weight, **_: weight.detach().clone()
    )
    trainer, seen = train(
        *("--tune_mm_mlp_adapter", "True", "--save_strategy", "no"),
        *("--bf16", "True", "--gradient_checkpointing", "True"),
    )
    model = trainer.model
    assert [report.kept_tokens for report in model.llava_hvp.last] == [32, 32]
    assert_rows(trainer, seen, visual=32)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.mm_projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    saved = torch.load(data / "llava-trained" / "mm_projector.bin")
    after = list(projector(model).parameters())
    assert all(not torch.equal(a, b) for a, b in zip(trainer.before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved.values(), after, strict=True))


def test_without_a_method_the_step_is_stocks(train):
    trainer, seen = train("--save_strategy", "no")
    assert_trained(trainer)
    assert "llava_hvp" not in vars(trainer.model)
    assert_rows(trainer, seen, visual=64)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ("--bits 16 --tune_mm_mlp_adapter True", "--tune_mm_mlp_adapter"),
        ("--tune_mm_mlp_adapter", "--tune_mm_mlp_adapter"),
        ("--lora_enable=true --tune_mm_mlp_adapter False", "--lora_enable"),
        ("--lora_enable False --tune_mm_mlp_adapter=no --lora_r 8", None),
    ],
)
def test_what_could_not_be_saved_without_deepspeed_is_not_trained(given, flag, monkeypatch):
    if flag is not None:
        with pytest.raises(OptionError, match=f"{flag}: .*deepspeed"):
            check_saving(given.split())
    # A checkout with patches/0008 imports it where a weight is partitioned only.
    monkeypatch.setattr(Path, "read_text", lambda path: SAVING)
    check_saving(given.split())


SAVING = """def maybe_zero_3(param, ignore_status=False, name=None):
    if hasattr(param, "ds_id"):
        from deepspeed import zero
"""


def test_arguments_of_llavas_scripts_are_called_as_this_release_calls_them(
    bridged_training, tmp_path
):
    script = ["--evaluation_strategy", "no", "--warmup_ratio=0.03", "--use_cpu", "True"]
    words = [*named_now(script), "--output_dir", str(tmp_path)]
    *_, training = parser_of_the_script().parse_args_into_dataclasses(words)
    strategy = vars(training).get("eval_strategy") or training.evaluation_strategy
    assert strategy == "no"
    assert training.get_warmup_steps(1000) == 30


def parser_of_the_script():
    from transformers import HfArgumentParser

    script = importlib.import_module("llava.train.train")
    kinds = (script.ModelArguments, script.DataArguments, script.TrainingArguments)
    return HfArgumentParser(kinds)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--tf32 True --bf16 True", "--bf16 True --use_cpu True"),
        ("--bf16 True --tf32=True", "--bf16 True --use_cpu True"),
        ("--tf32 --bf16 True --use_cpu", "--bf16 True --use_cpu"),
        ("--bf16 True --tf32", "--bf16 True --use_cpu True"),
    ],
)
def test_what_a_cpu_is_told(given, told):
    assert on_cpu(given.split()) == told.split()


def test_undone_exactly():
    bridge = MonkeyPatcher()
    bridge_training(bridge)  # transformers 4.37 and a new peft: its trainer imports from here on
    bridge.undo()
    trainer = importlib.import_module("transformers.trainer")
    owners = (trainer, trainer.Trainer, *llava_models())
    before = [dict(vars(owner)) for owner in owners]
    if transformers_version() >= (4, 57):
        assert "ALL_LAYERNORM_LAYERS" not in before[0]
    bridge_training(bridge)
    assert bool(bridge) == any(dict(vars(o)) != b for o, b in zip(owners, before, strict=True))
    bridge.undo()
    assert [dict(vars(owner)) for owner in owners] == before
