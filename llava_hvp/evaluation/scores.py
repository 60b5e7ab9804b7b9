"""A benchmark's number, from the stock scorer where there is one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from os import environ
from pathlib import Path
from statistics import mean

from llava_hvp.config import DISABLE_VARIABLE
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation import mmbench, mme, vqa
from llava_hvp.evaluation.benchmarks import Benchmark
from llava_hvp.evaluation.data import Data
from llava_hvp.evaluation.files import read_json
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_whole

STOCK = "llava.eval"
OWN = "llava-hvp"


@dataclass(frozen=True)
class Score:
    """What a scorer says, in percent but for MME.

    Parameters
    ----------
    scorer : str
        who counted
    upload : Path | None
        file for the benchmark's server
    """

    metrics: dict[str, float]
    scorer: str
    upload: Path | None = None
    notes: list[str] = field(default_factory=list)


def score(benchmark: Benchmark, data: Data, store: Store) -> Score:
    """Raises EvaluationError where the scorer fails."""
    return SCORERS[benchmark.name](data, store)


def _pope(data: Data, store: Store) -> Score:
    text = stock_script(
        "eval_pope.py",
        *("--annotation-dir", str(data.scoring["annotations"])),
        *("--question-file", str(data.questions.path)),
        *("--result-file", str(store.answers_file)),
    )
    metrics: dict[str, float] = {}
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    parts = re.split(r"^Category: (\w+), .*$", text, flags=re.MULTILINE)[1:]
    for category, lines in zip(parts[::2], parts[1::2], strict=True):
        for shown, name in names.items():
            found = re.search(rf"^{shown}: (\S+)$", lines, flags=re.MULTILINE)
            if found is None:
                raise _unreadable("eval_pope.py", text)
            metrics[f"{category}_{name}"] = 100 * float(found[1])
    for name in names.values():
        metrics[name] = mean(v for k, v in metrics.items() if k.endswith(f"_{name}"))
    return Score(metrics, STOCK, notes=["f1 and accuracy are means over the categories"])


def _textvqa(data: Data, store: Store) -> Score:
    text = stock_module(
        "llava.eval.eval_textvqa",
        *("--annotation-file", str(data.scoring["annotations"])),
        *("--result-file", str(store.answers_file)),
    )
    return Score({"accuracy": _percent("Accuracy", text)}, STOCK)


def _scienceqa(data: Data, store: Store) -> Score:
    details, summary = store.folder / "scienceqa.json", store.folder / "scienceqa_summary.json"
    stock_script(
        "eval_science_qa.py",
        *("--base-dir", str(data.scoring["problems"].parent)),
        *("--result-file", str(store.answers_file)),
        *("--output-file", str(details)),
        *("--output-result", str(summary)),
    )
    sorted_out = read_json(details)
    with_image = {
        name: sum(each["is_multimodal"] for each in sorted_out[name]) for name in sorted_out
    }
    return Score(
        {
            "accuracy": read_json(summary)["acc"],
            "image_accuracy": 100 * with_image["correct"] / sum(with_image.values()),
        },
        STOCK,
    )


def _gqa(data: Data, store: Store) -> Score:
    predictions = {
        answer.record["question_id"]: answer.record["text"].rstrip(".").lower()
        for answer in store.in_order
    }
    path = store.folder / "gqa_predictions.json"
    listed = [{"questionId": i, "prediction": text} for i, text in predictions.items()]
    write_whole(path, json.dumps(listed).encode())
    questions = data.scoring["questions"]
    if "eval" in data.scoring:
        text = run_scorer(
            [
                *(sys.executable, data.scoring["eval"].absolute(), "--tier", "testdev_balanced"),
                *("--questions", questions.absolute(), "--predictions", path.absolute()),
            ],
            "GQA's eval.py (Evaluation.md, section GQA, tells how to mend it; without the file "
            "llava-hvp counts the exact matches itself)",
            cwd=questions.parent,
        )
        return Score({"accuracy": _percent("Accuracy", text)}, "GQA's eval.py")
    asked = {i: q for i, q in read_json(questions).items() if q.get("isBalanced", True)}
    missing = [i for i in asked if i not in predictions]
    if missing:
        raise EvaluationError(
            f"{questions} asks {len(missing)} questions that {data.questions.path} does not have, "
            f"the first is {missing[0]}: the two belong to different splits"
        )
    right = mean(predictions[i] == question["answer"] for i, question in asked.items())
    return Score({"accuracy": 100 * right}, OWN, notes=["exact matches; no eval.py of GQA's here"])


def _mme(data: Data, store: Store) -> Score:
    assert data.images is not None
    folder = mme.write_answers(data.images, store, store.folder / "mme")
    own = mme.count(folder)
    scorer = data.scoring.get("calculation")
    if scorer is None:
        return Score(own, OWN, notes=["no eval_tool/calculation.py of MME's here"])
    if find_spec("sklearn") is None:
        return Score(own, OWN, notes=["MME's calculation.py needs scikit-learn: not used"])
    if any(not (folder / f"{name}.txt").exists() for name in mme.PERCEPTION + mme.COGNITION):
        return Score(own, OWN, notes=["MME's calculation.py needs all 14 categories: not used"])
    text = run_scorer(
        [sys.executable, scorer.absolute(), "--results_dir", folder.absolute()],
        "MME's calculation.py",
        cwd=scorer.parent,
    )
    totals = re.findall(r"^total score:\s*(\S+)", text, flags=re.MULTILINE)
    if len(totals) != 2:
        raise _unreadable("MME's calculation.py", text)
    perception, cognition = map(float, totals)
    both = {"perception": perception, "cognition": cognition, "total": perception + cognition}
    return Score(own | both, "MME's calculation.py")


def _mmbench(data: Data, store: Store) -> Score:
    upload = mmbench.write_upload(data.questions.path, store, store.folder / "upload.xlsx")
    metrics = mmbench.count(data.questions, store)
    notes = (
        [mmbench.HOW] if metrics else ["this split has no answers: upload the file to the server"]
    )
    return Score(metrics, OWN if metrics else "server", upload, notes)


def _vqa(write_upload: Callable[[Data, Store, Path], Path]) -> Callable[[Data, Store], Score]:
    def scorer(data: Data, store: Store) -> Score:
        upload = write_upload(data, store, store.folder / "upload.json")
        if "annotations" not in data.scoring:
            note = "upload the file to the server, or give --annotation-file for a split with one"
            return Score({}, "server", upload, [note])
        accuracy = vqa.count(data.scoring["annotations"], data.questions, store)
        return Score({"accuracy": accuracy}, "llava.eval.m4c_evaluator", upload)

    return scorer


SCORERS: dict[str, Callable[[Data, Store], Score]] = {
    "mme": _mme,
    "pope": _pope,
    "textvqa": _textvqa,
    "mmbench": _mmbench,
    "mmbench_cn": _mmbench,
    "scienceqa": _scienceqa,
    "gqa": _gqa,
    "vqav2": _vqa(vqa.write_vqav2_upload),
    "vizwiz": _vqa(vqa.write_vizwiz_upload),
}


def stock_script(name: str, *arguments: str) -> str:
    """What a stock scorer prints that imports nothing of LLaVA; run as LLaVA's scripts do."""
    spec = find_spec("llava")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise EvaluationError("no package `llava` here: pip install --no-deps llava-torch")
    return run_scorer([sys.executable, Path(folders[0]) / "eval" / name, *arguments], name)


def stock_module(name: str, *arguments: str) -> str:
    """What a stock scorer prints that imports LLaVA."""
    return run_scorer([sys.executable, "-m", name, *arguments], name)


def run_scorer(command: list[str | Path], name: str, cwd: Path | None = None) -> str:
    """Standard output of a scorer; raises EvaluationError where it fails."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**environ, DISABLE_VARIABLE: "1"},
    )
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()
        raise EvaluationError(
            f"{name} ended with exit code {result.returncode}: {last[-1]}. The answers are kept"
        )
    return result.stdout


def _percent(label: str, text: str) -> float:
    found = re.search(rf"^{label}: ([\d.]+)%", text, flags=re.MULTILINE)
    if found is None:
        raise _unreadable("the scorer", text)
    return float(found[1])


def _unreadable(name: str, text: str) -> EvaluationError:
    return EvaluationError(
        f"{name} did not print the score where it was looked for: {text[-200:]!r}"
    )
