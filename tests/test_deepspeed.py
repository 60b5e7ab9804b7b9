"""Training and generation pruned in two ranks under DeepSpeed, against one process without it."""

import json

import pytest
from ranks import run_ranks, train

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
}
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


def run(folder, output, *flags, stage=None, request=PRUNED, next_=False, world=2, steps=3):
    """The ends of ranks that train on four samples a step."""
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
        config.write_text(json.dumps({**ZERO, "zero_optimization": {"stage": stage}}))
        given["deepspeed"] = config
    words = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    is_launched = world > 1 or stage is not None
    return run_ranks(lambda rank: train([*words, *flags], request), world, launched=is_launched)


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
TEXT = "--prune-method hiprune++ --r-max 0.25 --prune-train"
RUNS = {
    "zero-2": (2, PRUNED, [], False),
    "zero-3": (3, PRUNED, [], False),
    "zero-3 unpruned": (3, UNPRUNED, [], False),
    "finetune_lora.sh": (3, UNIFORM, [*LORA, *HALF], False),
    "pretrain.sh": (2, UNIFORM, [*PROJECTOR, *HALF], False),
    "clip's text encoder": (3, TEXT, [], False),
    "next": (3, PRUNED, [], True),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_lose_as_one_process(name, shapes, alone, tmp_path):
    stage, request, flags, next_ = RUNS[name]
    settings = {"request": request, "next_": next_}
    output = tmp_path / "llava-out"
    two = Trained(run(shapes, output, *flags, stage=stage, **settings), output)
    # In half precision DeepSpeed keeps the weights in float32 besides, and the trainer would not.
    one = alone(*flags, stage=0 if "--bf16=True" in flags else None, **settings)
    assert two.losses == pytest.approx(one.losses, abs=5e-3)
    ranks = two.record["ranks"]
    assert [(each["rank"], each["images"]) for each in ranks] == [(0, 6), (1, 6)]
    assert two.record["steps"] == {"first": 1, "last": 3}
    for record in (one.record, two.record):
        assert record["given"] == request.replace(" --prune-train", "").split()
        assert record["counts"]["images"] == 12
    assert two.record["counts"] == pytest.approx(one.record["counts"])
    assert two.said.count("6 images, kept" if request != UNPRUNED else "unpruned: 6") == 2
