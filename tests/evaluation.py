"""Small data files in the real formats, and the stock commands that read them."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import skimage

PICTURES = ("rocket.jpg", "astronaut.png", "coffee.png", "chelsea.png")
GREEDY = "--temperature 0 --conv-mode vicuna_v1"
PYTHON = shlex.quote(sys.executable)
RUNNER = """
import shlex, sys
from llava_hvp.cli import main
for line in sys.stdin:
    try:
        code = main(shlex.split(line))
    except SystemExit as error:
        code = error.code
    for stream in (sys.stdout, sys.stderr):
        print("CODE", code, file=stream, flush=True)
"""


@dataclass(frozen=True)
class Command:
    """An eval command, without checkpoint and answers file.

    records : lines that its answers file must have
    images : images among them
    """

    line: str
    records: int
    images: int


# name of the answers file -> the command; both chunks of one question file, as gqa.sh has them.
COMMANDS = {
    "chunk0": Command(
        f"model_vqa_loader --question-file questions.jsonl --image-folder images {GREEDY} "
        "--max_new_tokens 8 --num-chunks 2 --chunk-idx 0",
        2,
        2,
    ),
    "chunk1": Command(
        f"model_vqa_loader --question-file questions.jsonl --image-folder images {GREEDY} "
        "--max_new_tokens 8 --num-chunks 2 --chunk-idx 1",
        1,
        1,
    ),
    "vqa": Command(
        f"model_vqa --question-file questions.jsonl --image-folder images {GREEDY}", 3, 3
    ),
    "science": Command(
        f"model_vqa_science --question-file science.json --image-folder images {GREEDY} "
        "--single-pred-prompt",
        2,
        1,
    ),
    "mmbench": Command(
        f"model_vqa_mmbench --question-file mmbench.tsv {GREEDY} --single-pred-prompt", 1, 1
    ),
}


def write_data(folder: Path) -> Path:
    """Question files of each format with their pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    data = Path(skimage.__file__).parent / "data"
    for name in PICTURES:
        shutil.copy(data / name, images / name)
    questions = [
        {"question_id": i, "image": name, "text": f"What is number {i}?", "category": "default"}
        for i, name in enumerate(PICTURES[:3])
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    science = [
        {"id": "7", "image": PICTURES[0], "conversations": [{"value": "Which?\n<image>"}]},
        {"id": "8", "conversations": [{"value": "Which? A. x B. y"}]},
    ]
    (folder / "science.json").write_text(json.dumps(science))
    with (folder / "mmbench.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "hint", "A", "B", "C", "D", "image"])
        image = base64.b64encode((data / PICTURES[1]).read_bytes()).decode()
        table.writerow([241, "Which?", "", "one", "two", "", "", image])
    return folder


def python_line(name: str, checkpoint: Path, answers: Path, extra: str = "") -> str:
    """What a shell script would say to write `answers/NAME.jsonl`."""
    return (
        f"{PYTHON} -m llava.eval.{COMMANDS[name].line} "
        f"--model-path {checkpoint} --answers-file {answers / name}.jsonl {extra}"
    )


def environment(**more: str) -> dict[str, str]:
    """As a user's shell with this environment active, and nothing of ours set but `more`."""
    ours = ("LLAVA_HVP", "LLAVA_HVP_DEVICE", "LLAVA_HVP_DISABLE")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    path = f"{Path(sys.executable).parent}{os.pathsep}{plain.get('PATH', '')}"
    threads = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    return {**plain, **threads, "PATH": path, **more}


def call(line: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell to its end."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=environment(**environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def run_all(folder: Path, lines: list[str]) -> list[tuple[int, str, str]]:
    """(code, what it printed, what it said) of each of our commands, all in one process.

    A start takes seconds.
    """
    (folder / "runner.py").write_text(RUNNER)
    result = call(f"{PYTHON} runner.py <<'END'\n" + "\n".join(lines) + "\nEND", folder)
    streams = [
        re.split(r"(?m)^CODE (\d+)\n", stream)[:-1] for stream in (result.stdout, result.stderr)
    ]
    assert [len(stream) for stream in streams] == [2 * len(lines)] * 2, result.stderr
    out, err = streams
    return list(zip(map(int, out[1::2]), out[::2], err[::2], strict=True))


def read_answers(path: Path) -> list[dict]:
    """Records of an answers file, less the random ids."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["answer_id"]
    return records


def stock_result(folder, benchmark, metrics, method=None, model="llava-v1.5-7b", **more):
    """A results file of `llava-hvp eval`."""
    path = folder / model / (method or "unpruned") / benchmark / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "kind": "llava-hvp result",
        "benchmark": benchmark,
        "harness": "llava.eval",
        "metric": next(iter(metrics)),
        "metrics": metrics,
        "model": model,
        "method": method or "unpruned",
        "options": {"num_tokens": 192, "layers": None} if method else None,
        "settings": {"without_ocr": False},
        "kept_tokens": 192.0 if method else 576.0,
        "kept_of_stock": 0.3,
        "kept_of_patches": 0.3,
        "ttft_ms": 90.0,
        "tokens_per_second": 20.0,
    } | more
    if method:
        content["options"].pop("layers", None)
    path.write_text(json.dumps(content))
    return path


def lmms_result(folder, task, metrics, extra="", throughput=None):
    """A results file of lmms-eval."""
    path = folder / "lmms" / task / f"2026_{len(extra)}_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {task: {"alias": task, **{f"{n},none": v for n, v in metrics.items()}}},
        "config": {"model": "llava_hvp", "model_args": f"pretrained=a/llava-v1.5-7b{extra}"},
        "throughput": throughput or {},
    }
    path.write_text(json.dumps(content))
