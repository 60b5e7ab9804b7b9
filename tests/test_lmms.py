"""The model `llava_hvp` of lmms-eval: found by its entry point, right in batches and processes.

In an environment of its own (`make test-lmms`), since lmms-eval brings a hundred packages.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchdata import picture

pytest.importorskip("lmms_eval")

TASK = """
task: things
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function things_utils.visual
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
VISUAL = """
from PIL import Image
def visual(doc):
    return [Image.open(name).convert("RGB") for name in doc["images"]]
"""
# Prompts of different lengths, one without a picture, and one picture of another shape.
DOCS = [("What is this?", 1), ("What is this really, and why?", 1), ("Why?", 0), ("Who?", 1)]
DOCS += [("What can be seen in the middle of this?", 1)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of our own."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = []
    for number, (question, images) in enumerate(DOCS):
        path = folder / f"{number}.png"
        picture(number).save(path)
        docs.append({"question": question, "images": [str(path)] * images, "answer": "x"})
    (folder / "things.json").write_text(json.dumps(docs))
    (folder / "things.yaml").write_text(TASK.format(data=folder / "things.json"))
    (folder / "things_utils.py").write_text(VISUAL)
    seen = [doc for doc in docs if doc["images"]]
    (folder / "seen.json").write_text(json.dumps(seen))
    own = TASK.format(data=folder / "seen.json").replace("things", "seen", 1)
    (folder / "seen.yaml").write_text(own)
    return folder


def lmms_eval(folder, out, model_args, *options, launch=(), run=(), model="llava_hvp", **environ):
    """Run the command; the process, and (answers, results) where there are some."""
    task = "things" if model == "llava_hvp" else "seen"
    command = [*run, sys.executable, *launch, "-m", "lmms_eval", "--model", model]
    command += ["--model_args", model_args, "--tasks", task, "--include_path", str(folder)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--log_samples", "--output_path", str(out), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **offline, **environ},
        check=False,
        timeout=300,
        start_new_session=True,  # lmms-eval asks the terminal things
    )
    found = list(Path(out).rglob("*_results.json")) if Path(out).exists() else []
    if not found:
        return result, None, None
    (samples,) = Path(out).rglob(f"*_samples_{task}.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    records.sort(key=lambda record: record["doc_id"])
    answers = [record["filtered_resps"] for record in records]
    return result, answers, json.loads(found[0].read_text())


@pytest.fixture(scope="module")
def alone(tasks, checkpoints, tmp_path_factory):
    """One process, one prompt at a time."""
    out = tmp_path_factory.mktemp("alone")
    path = checkpoints("llava-next-llama")
    arguments = f"pretrained={path},prune_method=hivtp,r_max=0.5,dtype=float32"
    result, answers, results = lmms_eval(tasks, out, arguments, "--device", "cpu")
    assert results is not None, result.stderr
    return arguments, answers, results, out


def test_its_results_have_ttft_and_kept_tokens(alone):
    _, answers, results, out = alone
    assert len(set(answers)) > 2
    assert all(answers)
    measured = results["throughput"]
    assert measured["avg_images"] == 4
    assert 0 < measured["avg_kept_tokens"] < measured["avg_stock_tokens"]
    assert 0.3 < measured["avg_kept_of_patches"] <= 0.5
    assert measured["avg_ttft_ms"] > 0
    assert measured["avg_tokens_per_second"] > 0

    from llava_hvp.evaluation.measured import read_results
    from llava_hvp.runtime import PruningConfig

    (found,) = read_results(out)
    assert (found.protocol.dtype, found.protocol.tower) == ("float32", "float32 sdpa")
    assert (found.benchmark, found.harness) == ("things", "lmms-eval")
    assert found.pruning == PruningConfig.of("hivtp", r_max=0.5)
    assert found.kept_tokens == measured["avg_kept_tokens"]


def test_two_processes_in_batches_agree_with_one_alone(alone, tasks, tmp_path):
    arguments, answers, results, _ = alone
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(29500 + os.getpid() % 400)]
    result, two, measured = lmms_eval(
        tasks, tmp_path, arguments, "--batch_size", "3", launch=launch
    )
    assert two == answers, result.stderr
    # Of both processes; where there is nothing left for one it repeats a document.
    assert measured["throughput"]["avg_images"] in (4, 5)
    kept = measured["throughput"]["avg_kept_of_patches"]
    assert kept == pytest.approx(results["throughput"]["avg_kept_of_patches"], abs=0.02)


def test_a_second_method_prunes_inside_and_its_results_are_read_again(tasks, checkpoints, tmp_path):
    given = "prune_method=hivtp,r_max=0.5,prune_inside=fastv,inside_ratio=0.25,inside_layer=1"
    arguments = f"pretrained={checkpoints('llava-1.5-llama')},{given}"
    result, answers, results = lmms_eval(tasks, tmp_path, arguments, "--device", "cpu")
    assert results is not None, result.stderr
    assert all(answers)
    assert "pruning on: hivtp+fastv r_max=0.5 inside_layer=1 inside_ratio=0.25" in result.stderr
    measured = results["throughput"]
    sent, average = measured["avg_kept_tokens"], measured["avg_average_tokens"]
    assert average == pytest.approx((sent + round(sent / 4)) / 2, abs=0.5)  # two layers

    from llava_hvp.evaluation.measured import read_results
    from llava_hvp.runtime import PruningConfig

    (found,) = read_results(tmp_path)
    assert found.pruning == PruningConfig.of(
        "hivtp+fastv", r_max=0.5, inside_ratio=0.25, inside_layer=1
    )
    assert found.kept_tokens == average


def test_an_error_is_no_empty_answer(tasks, checkpoints, tmp_path):
    path = checkpoints("llava-1.5-llama")
    for options, words in (
        ("prune_method=hivtp,r_max=2", "r_max=2"),
        ("prune_method=hivtp,layers=99", "give 1 to 23"),
    ):
        arguments = f"pretrained={path},{options}"
        result, _, results = lmms_eval(tasks, tmp_path, arguments, "--device", "cpu")
        assert result.returncode == 1
        assert results is None
        (line,) = [x for x in result.stderr.splitlines() if x.startswith("llava-hvp: error: ")]
        assert words in line


def by_flags(tasks, out, path, *flags, **environ):
    """lmms-eval's own model of transformers' LLaVA, under the launcher."""
    # It imports a reader of videos, which needs none of this.
    (tasks / "decord.py").write_text("VideoReader = cpu = None\n")
    search = os.pathsep.join(filter(None, (str(tasks), os.environ.get("PYTHONPATH"))))
    run = [sys.executable, "-m", "llava_hvp", "run", *flags, "--"]
    given = f"pretrained={path},device=cpu,device_map=cpu,dtype=float32"
    return lmms_eval(tasks, out, given, run=run, model="llava_hf", PYTHONPATH=search, **environ)


def test_lmms_evals_own_model_is_pruned_by_flags_and_recorded(tasks, hf, tmp_path):
    bundle = hf("llava-1.5-llama")
    flags = ("--prune-method", "hivtp", "--r-max", "0.5")
    result, answers, _ = by_flags(tasks, tmp_path, bundle.path, *flags)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("llava-hvp: ")]
    assert lines[0].startswith("llava-hvp: pruning on: hivtp r_max=0.5 (llava-hvp ")
    assert answers is not None, result.stderr
    (results,) = tmp_path.rglob("*_results.json")
    record = results.with_name(f"{results.name}.hvp.json")
    assert lines[-1].endswith(f"; record: {record}")
    found = json.loads(record.read_text())
    assert (found["method"], found["options"]["r_max"]) == ("hivtp", 0.5)
    counts = found["counts"]
    assert (counts["images"], counts["kept_tokens"]) == (4, 4 * 32)
    assert found["answers"]["sha256"] == hashlib.sha256(results.read_bytes()).hexdigest()
    (samples,) = found["samples"]
    assert samples["lines"] == len(answers) == 4
    assert all(answers)


def test_an_answer_that_was_refused_is_no_empty_one(tasks, hf, tmp_path):
    """lmms-eval goes on after whatever its models raise, with an empty answer."""
    bundle = hf("llava-1.5-llama")
    path = tmp_path / "refusing"
    shutil.copytree(bundle.path, path)
    config = json.loads((path / "generation_config.json").read_text())
    config["prompt_lookup_num_tokens"] = 3  # refused for a pruned prompt
    (path / "generation_config.json").write_text(json.dumps(config))
    flags = ("--prune-method", "hivtp", "--r-max", "0.5")
    result, answers, _ = by_flags(tasks, tmp_path / "out", path, *flags)
    assert not any(answers)
    assert result.returncode == 1
    assert "4 calls of the pruned model were refused" in result.stderr
    assert "prompt_lookup_num_tokens" in result.stderr
    assert not list(tmp_path.rglob("*.hvp.json"))


# --- in this process ---


def answers_of(path, batch, method=None, **more):
    from llava_hvp import prune
    from llava_hvp.checkpoints.opening import open_checkpoint

    calls = []
    checkpoint = open_checkpoint(str(path), "cpu", conv_mode="vicuna_v1")
    if method is not None:
        prune(checkpoint.model, method, tokenizer=checkpoint.tokenizer)
    images = [[picture(i)] * count for i, (_, count) in enumerate(DOCS)]
    texts = []
    for start in range(0, len(DOCS), batch):
        piece = slice(start, start + batch)
        texts += checkpoint.answer(
            [question for question, _ in DOCS[piece]],
            images[piece],
            calls.append,
            max_new_tokens=8,
            do_sample=False,
            **more,
        )
    return texts, calls


@pytest.mark.parametrize("name", ["llava-1.5-llama", "llava-next-llama"])
@pytest.mark.parametrize("method", [None, "hivtp"])
def test_a_batch_answers_as_its_prompts_alone(checkpoints, name, method):
    from llava_hvp.methods import get_method

    method = method and get_method(method, r_max=0.5)
    alone, calls = answers_of(checkpoints(name), 1, method)
    batched, in_batches = answers_of(checkpoints(name), 5, method)
    assert batched == alone
    assert len(set(alone)) > 2
    for field in ("images", "prompts", "tokens", "kept_tokens", "stock_tokens"):
        sums = [sum(getattr(c, field) for c in each) for each in (calls, in_batches)]
        assert sums[0] == sums[1], field
    assert sum(c.tokens for c in calls) == 5 * 8
    if method is None and "1.5" in name:
        assert sum(c.kept_tokens for c in calls) == 4 * 64


def test_it_opens_checkpoints_as_every_other_command(checkpoints):
    from llava_hvp.lmms.model import LlavaHvp

    path = str(checkpoints("llava-1.5-llama"))
    model = LlavaHvp(pretrained=path, device="cpu", prune_method="hivtp", r_max=0.5)
    assert (model.model.dtype, model.checkpoint.dtype) == (torch.float32, torch.float32)
    assert model.checkpoint.conv_mode == "llava_v0"  # as LLaVA's chat, for a name without v1
    assert model.model.llava_hvp.method.r_max == 0.5
    asked = LlavaHvp(pretrained=path, device="cpu", conv_template="vicuna_v1", dtype="float16")
    assert (asked.model.dtype, asked.checkpoint.conv_mode) == (torch.float16, "vicuna_v1")
    assert "llava_hvp" not in vars(asked.model)


@pytest.mark.parametrize("method", ["none", "hivtp"])
def test_every_picture_is_tiled_as_asked(checkpoints, method, capsys):
    from llava_hvp.lmms.model import LlavaHvp

    path = str(checkpoints("llava-next-llama"))
    options = {"tiling": 672, "patch_merge": "spatial"}  # as lmms-eval reads model_args
    model = LlavaHvp(pretrained=path, device="cpu", prune_method=method, **options)
    said = "unpruned (none" if method == "none" else "pruning on: hivtp r_max=0.5"
    assert f"{said} tiling=672 patch_merge=spatial" in capsys.readouterr().err
    tall, calls = picture(0).resize((100, 380)), []
    model.checkpoint.answer(["x"], [[tall]], calls.append, max_new_tokens=2, do_sample=False)
    (call,) = calls
    assert call.stock_tokens == 5 * 64
    assert (call.kept_tokens == call.stock_tokens) == (method == "none")


def test_wrong_arguments_end_before_a_model_is_loaded(capsys):
    from llava_hvp.lmms.model import LlavaHvp

    for arguments, words in (
        ({"prune_method": "hivtpp"}, "unknown method 'hivtpp'"),
        ({"r_max": 0.5}, "unknown argument 'r_max'"),
        ({"dtype": "half"}, "dtype=half: give one of float16"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"device": "cuda"}, "no CUDA on this machine"),
        ({"load_4bit": True, "load_8bit": True}, "exclude each other"),
    ):
        with pytest.raises(SystemExit) as ended:
            LlavaHvp(pretrained="nowhere", **arguments)
        assert ended.value.code == 1
        assert words in capsys.readouterr().err
