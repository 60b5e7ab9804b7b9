"""eval_scripts/ as a user types them: stock script, stock scorer, one results file."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from statistics import mean

import pytest
import torch
from benchdata import WRITERS, write_gqa, write_textvqa
from evaluation import call, environment, read_answers

from llava_hvp.cli import main
from llava_hvp.evaluation.benchmarks import BENCHMARKS
from llava_hvp.hosts.llava.compat.versions import transformers_version

SCRIPTS = Path(__file__).parents[1] / "eval_scripts"
CPU = "--model-path llava-v1.5-tiny --data data --device cpu"
HIVTP = "--prune-method hivtp --r-max 0.5"
SHORT = "--max_new_tokens 6"
STOCK = "sdpa" if transformers_version() >= (4, 46) else "eager"


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints):
    """A folder with a checkpoint, as a user's; each test writes its own data."""
    folder = tmp_path_factory.mktemp("scripts")
    checkpoint = shutil.copytree(checkpoints("llava-1.5-llama"), folder / "llava-v1.5-tiny")
    ends = {"eos_token_id": [2, *range(4, 512, 4)], "bos_token_id": 1, "pad_token_id": 0}
    (checkpoint / "generation_config.json").write_text(json.dumps(ends))
    return folder


def run(place, name, options, out="results", code=0):
    """The last line of a script, and its results file."""
    result = call(f"bash {SCRIPTS / name}.sh {CPU} --out {out} {options}", place)
    assert result.returncode == code, result.stderr
    if code:
        return result.stderr
    (path,) = (place / out).rglob("result.json")
    return path.parent, json.loads(path.read_text())


def test_the_scripts_are_those_of_the_benchmarks_and_all_alike():
    assert set(BENCHMARKS) == set(WRITERS)
    for name in (*WRITERS, "table"):
        path = SCRIPTS / f"{name}.sh"
        first, said, last = path.read_text().splitlines()
        assert first == "#!/usr/bin/env bash"
        assert said.startswith("# ")
        assert last.startswith("exec llava-hvp ")
        assert last.endswith(' "$@"')
        assert os.access(path, os.X_OK)


def f1(answers, labels):
    """Of one category of POPE, in the words of its definition."""
    said = [
        {"no", "No", "not"}.isdisjoint(a["text"].split(".")[0].replace(",", "").split(" "))
        for a in answers
    ]
    truth = [label["label"] == "yes" for label in labels]
    hits = sum(s and t for s, t in zip(said, truth, strict=True))
    return 200 * hits / (sum(said) + sum(truth))


def test_pope_in_one_piece_and_in_two_pruned_and_with_everything_kept(place):
    WRITERS["pope"](place / "data")
    stock, unpruned = run(place, "pope", SHORT, "stock")
    kept, everything = run(place, "pope", f"{SHORT} --prune-method hivtp --r-max 1", "all")
    whole, one = run(place, "pope", f"{SHORT} {HIVTP}", "one")
    pieces, two = run(place, "pope", f"{SHORT} {HIVTP} --gpus 0,1", "two")

    assert read_answers(kept / "answers.jsonl") == read_answers(stock / "answers.jsonl")
    assert everything["metrics"] == unpruned["metrics"]
    assert read_answers(pieces / "answers.jsonl") == read_answers(whole / "answers.jsonl")
    assert two["metrics"] == one["metrics"]
    assert read_answers(whole / "answers.jsonl") != read_answers(stock / "answers.jsonl")
    assert {p.name for p in (pieces / "parts").glob("*")} == {"0.log", "1.log"}

    answers = read_answers(whole / "answers.jsonl")
    expected = []
    for number, category in enumerate(("adversarial", "popular", "random")):
        path = place / f"data/pope/coco/coco_pope_{category}.json"
        labels = [json.loads(line) for line in path.read_text().splitlines()]
        expected.append(f1(answers[4 * number : 4 * number + 4], labels))
    assert one["value"] == pytest.approx(mean(expected))
    assert one["value"] == pytest.approx(one["metrics"]["f1"])

    assert (one["benchmark"], one["metric"], one["harness"]) == ("pope", "f1", "llava.eval")
    assert (one["model"], one["method"]) == ("llava-v1.5-tiny", "hivtp")
    assert one["options"]["r_max"] == 0.5
    assert (one["images"], one["questions"]) == (12, 12)
    assert 0.3 < one["kept_of_patches"] == one["kept_of_stock"] <= 0.5
    assert (unpruned["method"], unpruned["kept_tokens"], unpruned["kept_of_stock"]) == (
        "unpruned",
        64,
        1,
    )
    assert everything["kept_tokens"] == 64
    for result, attention in ((unpruned, STOCK), (everything, STOCK), (one, "sdpa")):
        assert result["ttft_ms"] > 0
        assert (result["model_dtype"], result["vision_tower_dtype"]) == ("float16", "float32")
        assert result["vision_tower_attention"] == attention
        assert result["tokens_per_second"] > 0
        assert {"torch", "transformers", "llava-hvp"} <= set(result["versions"])
        assert "eval pope" in result["command"]


def test_none_and_no_method_are_one_run(place):
    WRITERS["pope"](place / "data")
    folder, first = run(place, "pope", f"{SHORT} --prune-method none --r-max 0.5", "none")
    assert folder.parts[-2] == first["method"] == "unpruned"
    log = (folder / "parts/0.log").read_text()
    assert "pruning off (none)" in log
    assert "images encoded unpruned: 12" in log
    answers = (folder / "answers.jsonl").read_bytes()
    line = f"bash {SCRIPTS / 'pope'}.sh {CPU} {SHORT} --out none"
    again = call(line, place)
    assert again.returncode == 0, again.stderr
    assert "12 questions, 12 answered" in again.stderr
    assert (folder / "answers.jsonl").read_bytes() == answers


def test_a_killed_run_goes_on_and_other_settings_are_refused(place):
    WRITERS["pope"](place / "data", 40)
    line = f"bash {SCRIPTS / 'pope'}.sh {CPU} {HIVTP} --max_new_tokens 16 --out killed --gpus 0,1"
    answers = [
        place / f"killed/llava-v1.5-tiny/hivtp-r_max-0.5/pope/parts/{i}.answers.jsonl"
        for i in (0, 1)
    ]
    driver = subprocess.Popen(
        ["bash", "-c", f"exec {line}"],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while not all(path.exists() and path.stat().st_size > 900 for path in answers):
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = [text for path in answers for text in path.read_text().split("\n")[:-1]]
    with answers[0].open("a") as file:
        file.write('{"question_id": 3, "promp')
    assert 4 <= len(before) < 120

    refused = call(f"{line} --temperature 0.5", place)
    assert refused.returncode == 2
    assert "holds answers of other settings: arguments was" in refused.stderr
    assert all(path.exists() for path in answers)

    again = call(line, place)
    assert again.returncode == 0, again.stderr
    assert f"120 questions, {len(before)} answered" in again.stderr
    assert "half written" in again.stderr
    folder = answers[0].parents[1]
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert set(before) <= set(lines)
    assert [json.loads(text)["question_id"] for text in lines] == list(range(1, 121))
    result = json.loads((folder / "result.json").read_text())
    assert (result["images"], result["questions"]) == (120, 120)


def test_a_retrained_checkpoint_does_not_get_the_old_answers(place):
    """Retraining keeps the names and the sizes of all files."""
    WRITERS["pope"](place / "data")
    retrained = shutil.copytree(place / "llava-v1.5-tiny", place / "llava-v1.5-retrained")
    weights = retrained / "model.safetensors"
    line = (
        f"llava-hvp eval pope --model-path {retrained.name} --data data --device cpu {HIVTP} "
        f"{SHORT} --out retrained"
    )
    first, again = call(line, place), call(line, place)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "12 questions, 12 answered" in again.stderr
    assert first.stdout == again.stdout
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = call(line, place)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "model.safetensors of the model has changed. Give --restart" in refused.stderr
    (result,) = (place / "retrained").rglob("result.json")
    old = json.loads(result.read_text())["settings"]["checkpoint"]
    anew = call(f"{line} --restart", place)
    assert anew.returncode == 0, anew.stderr
    assert "12 questions, 0 answered" in anew.stderr
    new = json.loads(result.read_text())["settings"]["checkpoint"]
    assert {n for n in new["model"] if new["model"][n] != old["model"][n]} == {"model.safetensors"}
    assert new["vision tower"] == old["vision tower"]


def test_textvqa_by_llavas_evaluator_and_without_ocr(place, checkpoints):
    write_textvqa(place / "data")
    folder, _ = run(place, "textvqa", SHORT, "textvqa")
    answers = read_answers(folder / "answers.jsonl")
    assert all("Reference OCR token: STOP" in a["prompt"] for a in answers)
    # Now the truth holds what was said: nothing is asked again, only counted.
    write_textvqa(place / "data", [a["text"] for a in answers])
    _, result = run(place, "textvqa", SHORT, "textvqa")
    # Of ten annotators, six said it: each of the others sees min(1, 6 / 3), each of the six min(1,
    # 5 / 3); two said it: eight see 2 / 3, two see 1 / 3.
    expected = 100 * mean([1, (8 * 2 / 3 + 2 * 1 / 3) / 10, 0, 0])
    assert result["value"] == pytest.approx(expected, abs=0.005)
    assert result["notes"] == ["prompts with OCR tokens"]

    shutil.copytree(checkpoints("llava-next-llama"), place / "llava-v1.6-tiny")
    line = f"bash {SCRIPTS / 'textvqa'}.sh {CPU} {SHORT} --model-path llava-v1.6-tiny --out next"
    said = call(line, place)
    assert said.returncode == 0, said.stderr
    assert "without OCR tokens" in said.stderr
    (path,) = (place / "next").rglob("answers.jsonl")
    assert path.parent.name == "textvqa-no-ocr"
    assert all("OCR" not in a["prompt"] for a in read_answers(path))


def test_gqa_counts_exact_matches_of_balanced_questions_or_asks_eval_py(place):
    write_gqa(place / "data")
    folder, _ = run(place, "gqa", SHORT, "gqa")
    write_gqa(place / "data", [a["text"] for a in read_answers(folder / "answers.jsonl")])
    _, result = run(place, "gqa", SHORT, "gqa")
    assert result["value"] == pytest.approx(100 / 3)
    assert result["scorer"] == "llava-hvp"
    (place / "data/gqa/data/eval").mkdir()
    (place / "data/gqa/data/eval/eval.py").write_text(
        "import json, sys\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "said = json.load(open(given['--predictions']))\n"
        'print(f"Binary: 1.00%\\nAccuracy: {len(said)}.25%")\n'
    )
    _, result = run(place, "gqa", SHORT, "gqa")
    assert (result["value"], result["scorer"]) == (4.25, "GQA's eval.py")


def mme_score(folder, answers):
    """Perception: each of two categories has two pictures with a yes and a no."""
    total = 0
    for category in ("existence", "landmark"):
        said = [a["text"].lower()[:4] for a in answers if a["question_id"].startswith(category)]
        right = ["yes" in said[i] or ("no" in said[i] and i % 2 == 1) for i in range(4)]
        right = [r and not (i % 2 == 1 and "yes" in said[i]) for i, r in enumerate(right)]
        total += 25 * sum(right) + 50 * (right[0] and right[1]) + 50 * (right[2] and right[3])
    return total


def scienceqa_score(folder, answers):
    """The truth of both questions with a picture is A."""
    return 50 * sum(a["text"][:3] in ("A", "A. ") for a in (answers[0], answers[2]))


def mmbench_score(folder, answers):
    """Letters only; the first two are one question in two rotations."""
    said = [
        a["text"].strip()[:1] if a["text"].strip()[1:2] in ("", ".", " ") else "" for a in answers
    ]
    right = [letter == truth for letter, truth in zip(said, "ACBD", strict=True)]
    return 100 * mean([right[0] and right[1], right[2], right[3]])


@pytest.mark.parametrize(
    ("name", "metric", "expected"),
    [
        ("mme", "perception", mme_score),
        ("scienceqa", "image_accuracy", scienceqa_score),
        ("mmbench", "circular_accuracy", mmbench_score),
        ("mmbench_cn", "circular_accuracy", mmbench_score),
        ("vqav2", "accuracy", None),
        ("vizwiz", "accuracy", None),
    ],
)
def test_the_others_run_to_their_results_file(place, name, metric, expected):
    """Right answers of the tiny checkpoint are luck; test_eval_scores.py has more of them."""
    WRITERS[name](place / "data")
    # In three pieces: MMBench's rows are chosen inside the stock script.
    options = f"{HIVTP} --gpus 0,1,2" if name == "mmbench_cn" else HIVTP
    folder, result = run(place, name, options + f" {SHORT}" * name.startswith("v"), name)
    answers = read_answers(folder / "answers.jsonl")
    value = expected and pytest.approx(expected(folder, answers))
    assert (result["metric"], result["value"]) == (metric, value)
    assert result["kept_tokens"] <= 32
    if name == "mmbench":
        import pandas

        upload = pandas.read_excel(folder / "upload.xlsx")
        assert upload["prediction"].astype(str).tolist() == [a["text"] for a in answers]
        assert upload["index"].tolist() == [241, 1000241, 252, 253]
    if value is None:
        upload = json.loads((folder / "upload.json").read_text())
        assert len(upload) == (4 if name == "vqav2" else 3)
        assert all(
            set(each) == {"question_id" if name == "vqav2" else "image", "answer"}
            for each in upload
        )


def test_wrong_input_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("LLAVA_HVP", "LLAVA_HVP_DEVICE", "LLAVA_HVP_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    WRITERS["pope"](tmp_path / "data")
    (tmp_path / "data/pope/val2014/COCO_val2014_000000000001.jpg").unlink()
    for line, words in (
        ("pope --data nowhere", ["pope/llava_pope_test.jsonl", "Section 'POPE'", "--data"]),
        ("pope --data data", ["1 of 2 pictures", "COCO_val2014_000000000001.jpg"]),
        ("pope --prune-method hivtpp", ["unknown method 'hivtpp'"]),
        ("pope --r-max 0.5", ["--r-max without --prune-method"]),
        ("pope --data data --image-folder . --num-chunks 2", ["--num-chunks", "--gpus"]),
        ("pope --gpus 0,0", ["--gpus '0,0'"]),
        ("pop", ["unknown benchmark 'pop': give one of mme, pope"]),
        ("ocrbench", ["lmms-eval --model llava_hvp"]),
    ):
        assert main(["eval", *line.split(), "--model-path", "m", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert all(word in error for word in words), error
    if not torch.cuda.is_available():
        assert main(["eval", "pope", "--model-path", "m"]) == 2
        assert "give --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
