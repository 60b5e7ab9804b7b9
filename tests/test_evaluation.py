"""The stock eval commands, unchanged, behind the launcher and with flags of their own."""

import json
import shutil

import pytest
from evaluation import COMMANDS, PICTURES, call, python_line, read_answers, write_data

from llava_hvp.pruning.record import answers_facts

# Stock commands in one process, unpruned: only `.cuda()` and the gaps of versions are bridged.
BASELINE = """
import runpy, shlex, sys
for line in sys.stdin:
    _, module, *sys.argv[1:] = shlex.split(line)[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
LAUNCHED = "llava-hvp run --device cpu --prune-method {method} --r-max {r_max} -- bash script.sh"


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints):
    """A folder with data, a checkpoint, and the answers of stock LLaVA."""
    folder = write_data(tmp_path_factory.mktemp("evaluation") / "data")
    checkpoint = shutil.copytree(checkpoints("llava-1.5-llama"), folder / "llava-v1.5-tiny")
    # Some commands generate 1024 tokens, unless the model ends: let every fourth id be an end.
    ends = {"eos_token_id": [2, *range(4, 512, 4)], "bos_token_id": 1, "pad_token_id": 0}
    (checkpoint / "generation_config.json").write_text(json.dumps(ends))
    lines = "\n".join(python_line(n, checkpoint, folder / "stock") for n in COMMANDS)
    (folder / "baseline.py").write_text(BASELINE)
    result = call(f"python baseline.py <<'END'\n{lines}\nEND", folder, LLAVA_HVP_DEVICE="cpu")
    assert result.returncode == 0, result.stderr
    assert "llava-hvp:" not in result.stderr
    assert "deprecated" not in result.stderr
    return folder


def script(place, answers, names=COMMANDS):
    """Two commands at a time in the background, as gqa.sh starts one for each GPU."""
    lines = [python_line(n, place / "llava-v1.5-tiny", place / answers) for n in names]
    pairs = [" &\n".join(lines[i : i + 2]) + " &\nwait\n" for i in range(0, len(lines), 2)]
    (place / "script.sh").write_text("".join(pairs))


@pytest.fixture(scope="module")
def launched(place):
    """A function that runs all commands in one launched script, and gives its result."""

    def run(method, r_max):
        answers = f"{method}-{r_max}"
        script(place, answers)
        result = call(LAUNCHED.format(method=method, r_max=r_max), place)
        assert result.returncode == 0, result.stderr
        assert "deprecated" not in result.stderr
        return place / answers, result

    return run


@pytest.fixture(scope="module")
def pruned(launched):
    return launched("hivtp", 0.5)


def record(folder, name):
    return json.loads((folder / f"{name}.jsonl.hvp.json").read_text())


def test_with_everything_kept_the_answers_are_those_of_stock(launched, place):
    answers, _ = launched("hivtp", 1)
    for name, command in COMMANDS.items():
        mine = read_answers(answers / f"{name}.jsonl")
        assert mine == read_answers(place / "stock" / f"{name}.jsonl"), name
        assert len(mine) == command.records
        assert record(answers, name)["counts"]["images"] == command.images


def test_none_is_stock_on_every_command_and_recorded_as_such(launched, place):
    answers, result = launched("none", 0.5)
    for name, command in COMMANDS.items():
        mine = read_answers(answers / f"{name}.jsonl")
        assert mine == read_answers(place / "stock" / f"{name}.jsonl"), name
        found = record(answers, name)
        assert (found["method"], found["options"]) == ("none", None)
        assert found["given"] == ["--prune-method", "none"]
        assert found["answers"] == answers_facts(answers / f"{name}.jsonl")
        assert found["dtype"] == "float16"
        tokens = 64 * command.images
        assert found["counts"] == {
            "images": command.images,
            "kept_tokens": tokens,
            "stock_tokens": tokens,
            "mean_kept_of_stock": 1.0,
            "mean_kept_of_patches": 1.0,
            "reused": 0,
        }
    off = "pruning off (none): every visual token is kept, whatever the budget (llava-hvp"
    assert result.stderr.count(off) == len(COMMANDS)
    assert result.stderr.count("images encoded unpruned: ") == len(COMMANDS)
    images = sum(command.images for command in COMMANDS.values())
    assert f"{len(COMMANDS)} processes, {images} images, kept 100.0% of stock's" in result.stderr


def test_every_answer_is_there_and_pruned(pruned, place):
    answers, _ = pruned
    for name, command in COMMANDS.items():
        mine, stock = (read_answers(d / f"{name}.jsonl") for d in (answers, place / "stock"))
        assert [r["question_id"] for r in mine] == [r["question_id"] for r in stock]
        assert [r["prompt"] for r in mine] == [r["prompt"] for r in stock]
        counts = record(answers, name)["counts"]
        assert counts["images"] == command.images
        assert 0.3 < counts["mean_kept_of_stock"] <= 0.5
        assert counts["kept_tokens"] < counts["stock_tokens"] == 64 * command.images
    texts = [
        [r["text"] for n in COMMANDS for r in read_answers(d / f"{n}.jsonl")]
        for d in (answers, place / "stock")
    ]
    assert texts[0] != texts[1]


def test_questions_without_a_picture_are_answered_as_by_stock(pruned, place):
    mine, stock = (read_answers(d / "science.jsonl") for d in (pruned[0], place / "stock"))
    assert mine[1]["question_id"] == "8"
    assert mine[1] == stock[1]


def test_each_process_says_that_it_prunes_and_what_it_did(pruned):
    lines = [line for line in pruned[1].stderr.splitlines() if "llava-hvp: " in line]
    on = [line for line in lines if "pruning on: hivtp r_max=0.5 (" in line]
    assert len(on) == len(COMMANDS)
    assert all("transformers" in line and "llava-torch 1.2.2.post1" in line for line in on)
    assert sum("record: " in line for line in lines) == len(COMMANDS)
    images = sum(command.images for command in COMMANDS.values())
    assert f"{len(COMMANDS)} processes, {images} images, kept" in lines[-1]


def test_the_record_says_how_the_answers_were_made(pruned):
    found = record(pruned[0], "chunk0")
    assert (found["method"], found["options"]["r_max"]) == ("hivtp", 0.5)
    assert found["given"] == ["--prune-method", "hivtp", "--r-max", "0.5"]
    assert found["command"][0] == "llava.eval.model_vqa_loader"
    assert {"llava-hvp", "llava", "torch", "transformers", "python"} <= set(found["versions"])
    assert found["dtype"] == "float16"
    assert (found["vision_tower_dtype"], found["vision_tower_attention"]) == ("float32", "sdpa")
    assert found["device"] == "cpu"
    assert found["answers"] == answers_facts(pruned[0] / "chunk0.jsonl")


def test_flags_on_the_command_itself(place, pruned):
    line = python_line(
        "chunk1", place / "llava-v1.5-tiny", place / "flags", "--device cpu --prune-method hivtp"
    )
    result = call(line, place)
    assert result.returncode == 0, result.stderr
    assert read_answers(place / "flags/chunk1.jsonl") == read_answers(pruned[0] / "chunk1.jsonl")
    assert record(place / "flags", "chunk1")["given"] == record(pruned[0], "chunk1")["given"]


def test_flags_win_over_the_variable_and_run_llava_takes_them(place):
    line = (
        "python -m llava.eval.run_llava --model-path llava-v1.5-tiny --query What? --temperature 0 "
        f"--max_new_tokens 4 --image-file images/{PICTURES[0]} --prune-method hiprune++ "
        "--num-tokens 16 --prune-opt beta=0.5"
    )
    result = call(line, place, LLAVA_HVP="--prune-method hivtp", LLAVA_HVP_DEVICE="cpu")
    assert result.returncode == 0, result.stderr
    assert "pruning on: hiprune++ num_tokens=16 beta=0.5" in result.stderr
    assert "1 image, kept 25.0% of stock's" in result.stderr
    assert "deprecated" not in result.stderr
    assert result.stdout.strip()
    unpruned = line.replace("hiprune++", "none")
    result = call(unpruned, place, LLAVA_HVP="--prune-method hivtp", LLAVA_HVP_DEVICE="cpu")
    assert result.returncode == 0, result.stderr
    assert "pruning on" not in result.stderr
    assert result.stderr.endswith("llava-hvp: images encoded unpruned: 1\n")
    assert result.stdout.strip()


def test_a_command_that_fails_leaves_no_record(place):
    folder = place / "failing"
    folder.mkdir()
    (folder / "vqa.jsonl").write_text("answers of another day\n")
    (folder / "vqa.jsonl.hvp.json").write_text("{}")
    (place / "images" / PICTURES[2]).rename(place / "away.png")
    try:
        script(place, "failing", ["vqa"])
        (place / "script.sh").write_text((place / "script.sh").read_text() + "echo scored\n")
        result = call(LAUNCHED.format(method="hivtp", r_max=0.5), place)
    finally:
        (place / "away.png").rename(place / "images" / PICTURES[2])
    assert "scored" in result.stdout
    assert result.returncode == 1
    assert "did not finish pruned: FileNotFoundError" in result.stderr
    assert not (folder / "vqa.jsonl.hvp.json").exists()
