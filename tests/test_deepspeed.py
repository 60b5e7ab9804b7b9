"""Training and generation pruned in two ranks under DeepSpeed, against one process without it."""

import importlib.util
import json
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import torch
from evaluation import call
from ranks import run_ranks, train
from safetensors.torch import load_file, save_file

from llava_hvp.cli import main

deepspeed = pytest.importorskip("deepspeed")
pytest.importorskip("transformers.trainer")  # or each fork would import it

PRUNED = "--prune-method hivtp --r-max 0.25 --prune-train"
# As LLaVA's own configurations have it.
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_force_ds_cpu_optimizer": False,
}
GATHER = "stage3_gather_16bit_weights_on_model_save"
# As in LLaVA's zero3_offload.json, by torch's Adam too.
OPTIMIZER = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
}
# With torch's Adam in place of DeepSpeed's own, which it would compile for two minutes.
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = OFFLOAD | {"offload_param": {"device": "cpu"}}
LORA = ["--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16", "--mm_projector_lr", "4e-4"]
HALF = ["--bf16=True", "--gradient_checkpointing=True"]
PROJECTOR = ["--tune_mm_mlp_adapter", "True"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder with the shipped checkpoints and pictures to train on."""
    folder = tmp_path_factory.mktemp("shapes")
    assert main(["shapes", str(folder), "--training", "24", "--questions", "8"]) == 0
    return folder


class Trained:
    """What a training left: losses, its record, what its ranks said, its folder."""

    def __init__(self, ranks, output):
        self.said = "\n".join(rank.said for rank in ranks)
        assert {rank.code for rank in ranks} == {0}, self.said
        self.output = output
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        self.losses = [entry["loss"] for entry in log if "loss" in entry]
        self.record = json.loads((output / "hvp.json").read_text())


def arguments(folder, output, *, stage=None, offload=None, next_=False, world=2, steps=3):
    """Of LLaVA's training script, for four samples a step."""
    checkpoint = folder / ("llava-shapes-next" if next_ else "llava-shapes")
    given = {
        "model_name_or_path": checkpoint,
        "vision_tower": checkpoint / "vision-tower",
        "version": "v1",
        "data_path": checkpoint / "training.json",
        "image_folder": checkpoint,
        "image_aspect_ratio": "anyres" if next_ else "pad",
        "output_dir": output,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "model_max_length": 2048,
        "lazy_preprocess": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2 // world,
        "learning_rate": 2e-4,
        "evaluation_strategy": "no",
        "warmup_ratio": 0.03,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "tf32": True,
    }
    if next_:
        given["mm_patch_merge_type"] = "spatial_unpad"
    if stage is not None:
        config = output.with_name(f"zero{stage}.json")
        zero = {"stage": stage, GATHER: True} | (offload or {})
        config.write_text(json.dumps(ZERO | {"zero_optimization": zero}))
        given["deepspeed"] = config
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)]


def train_script():
    """The file that LLaVA's shell scripts give to `deepspeed`."""
    return Path(importlib.util.find_spec("llava").origin).parent / "train" / "train.py"


def run(folder, output, *flags, stage=None, request=PRUNED, world=2, **settings):
    """The ends of ranks that train. Of a pair of requests each has one."""
    words = [*arguments(folder, output, stage=stage, world=world, **settings), *flags]
    requests = (request,) * world if isinstance(request, str) else request
    is_launched = world > 1 or stage is not None
    return run_ranks(lambda rank: train(words, requests[rank]), world, launched=is_launched)


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory):
    """A function that trains in one process without DeepSpeed, each training once."""
    done = {}

    def get(*flags, **settings):
        key = (flags, *settings.items())
        if key not in done:
            output = tmp_path_factory.mktemp("alone") / "llava-alone"
            done[key] = Trained(run(shapes, output, *flags, world=1, **settings), output)
        return done[key]

    return get


UNPRUNED = "--prune-method none"
# What it keeps does not hang on rounding, which in bfloat16 ZeRO-3 does in another way.
UNIFORM = "--prune-method uniform --r-max 0.25 --prune-train"
TURNS = "--prune-method uniform --train-r-max 1.0,0.25,0.11 --prune-train"
TEXT = "--prune-method hiprune++ --r-max 0.25 --prune-train"
RUNS = {
    "zero-0": (0, PRUNED, [], {}),
    "zero-1": (1, PRUNED, [], {}),
    "zero-2": (2, PRUNED, [], {}),
    "zero-2 offload": (2, PRUNED, [], {"offload": OFFLOAD}),
    "zero-3": (3, PRUNED, [], {}),
    "zero-3 offload": (3, PRUNED, [], {"offload": OFFLOAD_ALL}),
    "zero-3 unpruned": (3, UNPRUNED, [], {}),
    "zero-3 by turns": (3, TURNS, [], {}),
    "finetune_lora.sh": (3, UNIFORM, [*LORA, *HALF], {}),
    "pretrain.sh": (2, UNIFORM, [*PROJECTOR, *HALF], {}),
    "clip's text encoder": (3, TEXT, [], {}),
    "next": (3, PRUNED, [], {"next_": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_lose_as_one_process(name, shapes, alone, tmp_path):
    stage, request, flags, more = RUNS[name]
    settings = {"request": request, "next_": more.get("next_", False)}
    output = tmp_path / "llava-out"
    two = Trained(run(shapes, output, *flags, stage=stage, **settings | more), output)
    # In half precision DeepSpeed keeps the weights in float32 besides, and the trainer would not.
    one = alone(*flags, stage=0 if "--bf16=True" in flags else None, **settings)
    assert two.losses == pytest.approx(one.losses, abs=1e-2 if "--bf16=True" in flags else 5e-3)
    ranks = two.record["ranks"]
    assert [(each["rank"], each["images"]) for each in ranks] == [(0, 6), (1, 6)]
    assert two.record["steps"] == {"first": 1, "last": 3}
    for record in (one.record, two.record):
        assert record["given"] == request.replace(" --prune-train", "").split()
        assert record["counts"]["images"] == 12
    counts, alone_counts = dict(two.record["counts"]), dict(one.record["counts"])
    used, used_alone = (c.pop("by_method", {}) for c in (counts, alone_counts))
    assert counts == pytest.approx(alone_counts)
    assert used.keys() == used_alone.keys()
    if request is TURNS:  # a step each, 144 patches, 36 and 16
        assert counts["kept_tokens"] == 4 * (144 + 36 + 16)
    assert two.said.count("6 images, kept" if request != UNPRUNED else "unpruned: 6") == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (UNPRUNED, "rank 1 on .* was asked for --prune-method none, rank 0 on .* --r-max 0.25"),
        (PRUNED.replace("0.25", "0.5"), "asked for --prune-method hivtp --r-max 0.5, rank 0"),
        ("", "rank 1 of 2 does not prune by llava-hvp, or not yet after 2 s"),
    ],
    ids=["unpruned", "another budget", "without us"],
)
def test_ranks_that_would_prune_otherwise_end_the_training(
    shapes, tmp_path, monkeypatch, other, message
):
    monkeypatch.setattr("llava_hvp.hook.ranks.AT_BEGIN", 2)
    output = tmp_path / "llava-out"
    ranks = run(shapes, output, stage=2, request=(PRUNED, other))
    assert ranks[0].code != 0
    assert re.search(message, ranks[0].said), ranks[0].said
    assert "give the flags on the training command" in ranks[0].said
    assert not (output / "hvp.json").exists()


def test_a_plain_language_model_gets_a_projector(shapes, tmp_path):
    """As Vicuna does in finetune.sh."""
    plain = shutil.copytree(shapes / "llava-shapes", tmp_path / "vicuna")
    config = json.loads((plain / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("mm_")}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (plain / "config.json").write_text(json.dumps(config))
    weights = load_file(plain / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "mm_projector" not in name}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    base, output = f"--model_name_or_path={plain}", tmp_path / "llava-out"
    trained = Trained(run(shapes, output, base, *HALF, stage=3, world=1), output)
    assert trained.record["counts"]["images"] == 12
    projector = load_file(output / "model.safetensors")["model.mm_projector.0.weight"]
    assert projector.dtype == torch.bfloat16
    assert projector.isfinite().all()
    assert projector.any()


def test_an_optimizer_may_be_deepspeeds_own(shapes, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ZERO", ZERO | OPTIMIZER)
    output = tmp_path / "llava-out"
    two = Trained(run(shapes, output, stage=3, offload=OFFLOAD_ALL), output)
    assert two.losses[0] == pytest.approx(alone(request=PRUNED, next_=False).losses[0], abs=5e-3)
    assert two.record["counts"]["images"] == 12
    assert (output / "model.safetensors").exists()


def test_a_training_that_was_stopped_goes_on(shapes, tmp_path):
    output = tmp_path / "llava-out"
    saving = ("--save_strategy=steps", "--save_steps=2", "--lr_scheduler_type=constant")
    settings = {"stage": 3, "request": TURNS}
    whole = Trained(
        run(shapes, tmp_path / "llava-whole", *saving, **settings), tmp_path / "llava-whole"
    )
    begun = Trained(run(shapes, output, *saving, **settings, steps=2), output)
    again = Trained(run(shapes, output, *saving, **settings), output)
    assert again.losses == pytest.approx(whole.losses, abs=5e-3)
    assert again.record["steps"] == {"first": 3, "last": 3}
    assert again.record["counts"]["images"] == 4
    kept = [each.record["counts"]["kept_tokens"] for each in (begun, again, whole)]
    assert kept[0] + kept[1] == kept[2]  # it has the turn that was left


# What stands for pdsh on two "nodes", both this machine: a shell with nothing of ours on each.
PDSH = """#!/bin/bash
while [[ $1 == -* ]]; do
    case $1 in -w) hosts=$2; shift 2;; -S) shift;; *) shift 2;; esac
done
node=0
for host in ${hosts//,/ }; do
    env -i PATH="$PATH" HOME="$HOME" OMP_NUM_THREADS=1 bash -c "${*//%n/$node}" & ids+=($!)
    node=$((node + 1))
done
for id in ${ids[@]}; do wait $id || code=$?; done
exit ${code:-0}
"""


def test_the_real_launcher_takes_our_flags_to_every_node(shapes, tmp_path):
    (tmp_path / "pdsh").write_text(PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    words, output = arguments(shapes, tmp_path / "llava-out", stage=3), tmp_path / "llava-out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        f"llava-hvp run {PRUNED} -- deepspeed --hostfile hosts --no_ssh_check "
        f"--master_addr 127.0.0.1 --master_port {port} {train_script()} {shlex.join(words)}"
    )
    done = call(f"PATH={tmp_path}:$PATH; {launcher}", tmp_path, LLAVA_HVP_DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((output / "hvp.json").read_text())
    assert [(each["rank"], each["images"]) for each in record["ranks"]] == [(0, 6), (1, 6)]
    assert "2 ranks on 1 host: 12 images, kept 25.0%" in done.stdout + done.stderr
    assert "2 processes, 12 images, kept 25.0%" in done.stderr
