"""A published table as commands: which harness, which data, how many images."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_hvp import config
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.config import Request
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.benchmarks import get_benchmark
from llava_hvp.evaluation.data import find_data
from llava_hvp.evaluation.digests import CACHE, difference, digests_of
from llava_hvp.evaluation.files import read_json
from llava_hvp.evaluation.measured import LMMS_HARNESS, find, read_results
from llava_hvp.evaluation.model_args import model_args
from llava_hvp.evaluation.published import Column, Row, Table, with_stock_attention
from llava_hvp.evaluation.settings import method_name
from llava_hvp.files import write_json

# Images of lmms-eval's tasks, for estimates.
IMAGES = {
    "mme": 2374,
    "pope": 9000,
    "textvqa_val": 5000,
    "mmbench_en_dev": 4329,
    "scienceqa_img": 2017,
    "ocrbench": 1000,
    "gqa": 12578,
    "ai2d": 3088,
    "vizwiz_vqa_val": 4319,
}


@dataclass(frozen=True)
class Step:
    """One command of a table.

    Parameters
    ----------
    data : str
        where it comes from, in words; missing : why the command cannot run, if so
    """

    row: Row
    column: Column
    command: list[str]
    environ: dict[str, str]
    data: str
    images: int
    missing: str = ""

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in self.environ.items()]
        return shlex.join(given + self.command)


def plan(
    table: Table,
    *,
    model_path: str,
    data: Path,
    out: Path,
    gpus: Sequence[str],
    device: str | None,
    only: Sequence[str] = (),
    prior: bool = False,
    stock: Sequence[str] = (),
) -> list[Step]:
    """The commands of a table, setting by setting; raises OptionError for an unknown benchmark.

    The vision tower keeps its own attention, as in the released codes.

    Parameters
    ----------
    only : Sequence[str]
        of these benchmarks
    prior : bool
        the rows of prior methods too, where their setting is known
    stock : Sequence[str]
        further arguments for LLaVA's scripts
    """
    known = {column.benchmark for column in table.columns}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise OptionError(f"--only {unknown[0]}: {table.name} has {', '.join(sorted(known))}")
    columns = [c for c in table.columns if not only or c.benchmark in only]
    sources = {c.benchmark: _source(c, data) for c in columns}
    steps = []
    rows = [row for row in (table.rows if prior else table.own) if row.can_run]
    if not rows:
        raise OptionError(f"{table.name} has rows of prior methods only: give --prior")
    for row in (replace(r, pruning=with_stock_attention(r.pruning)) for r in rows):
        for column in columns:
            make = _lmms if column.harness == LMMS_HARNESS else _stock
            command, environ = make(row, column, model_path, data, out, gpus, device, stock)
            steps.append(Step(row, column, command, environ, *sources[column.benchmark]))
    return steps


def _source(column: Column, root: Path) -> tuple[str, int, str]:
    """Where the data is, how many images it has, and what is missing."""
    if column.harness == LMMS_HARNESS:
        where = f"lmms-eval fetches task {column.task}"
        images = IMAGES[column.task or ""]
        if importlib.util.find_spec("lmms_eval") is None:
            reason = (
                f"{column.label} runs through lmms-eval, which is not installed: see the README, "
                "or leave it out with --only"
            )
            return where, images, reason
        return where, images, ""
    benchmark = get_benchmark(column.benchmark)
    try:
        found = find_data(benchmark, root, look_at_images=False)
    except (EvaluationError, OptionError) as error:
        return str(root / benchmark.questions[0]), benchmark.pictures, str(error)
    count = sum(name is not None for name in found.questions.images)
    return str(found.questions.path), count, ""


def _stock(
    row: Row,
    column: Column,
    model_path: str,
    data: Path,
    out: Path,
    gpus: Sequence[str],
    device: str | None,
    stock: Sequence[str],
) -> tuple[list[str], dict[str, str]]:
    flags = config.to_flags(Request(row.pruning, device=device))
    command = [sys.executable, "-m", "llava_hvp", "eval", column.benchmark]
    command += ["--model-path", model_path, "--data", str(data), "--out", str(out)]
    return [*command, "--gpus", ",".join(gpus), *column.flags, *flags, *stock], {}


def _lmms(
    row: Row,
    column: Column,
    model_path: str,
    data: Path,
    out: Path,
    gpus: Sequence[str],
    device: str | None,
    stock: Sequence[str],
) -> tuple[list[str], dict[str, str]]:
    folder = _lmms_folder(out, model_path, row)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--num_processes", str(len(gpus)), *(["--cpu"] if device == "cpu" else [])]
    command = [
        *(*launch, "-m", "lmms_eval", "--model", "llava_hvp"),
        *("--model_args", model_args(model_path, row.pruning), "--tasks", column.task or ""),
        *("--batch_size", "1", "--output_path", str(folder)),
        *(["--device", "cpu"] if device == "cpu" else []),
    ]
    return command, {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _lmms_folder(out: Path, model_path: str, row: Row) -> Path:
    return out / "lmms-eval" / model_name(model_path) / method_name(row.pruning)


def check(steps: Sequence[Step]) -> None:
    """Raise EvaluationError, with all that is missing, unless every command can run."""
    missing = list(dict.fromkeys(step.missing for step in steps if step.missing))
    if missing:
        raise EvaluationError("; ".join(missing))


def is_done(step: Step, out: Path, model_path: str) -> bool:
    """Whether lmms-eval has left the result of a step; `llava-hvp eval` sees to its own."""
    if step.column.harness != LMMS_HARNESS or not out.is_dir():
        return False
    try:
        results = read_results(out, model_name(model_path))
    except OptionError:
        return False
    found = find(results, step.column, step.row.pruning)
    if found is None or found[0].harness != LMMS_HARNESS:
        return False
    return found[0].pruning == step.row.pruning


def check_checkpoint(step: Step, out: Path, model_path: str) -> None:
    """Note what lmms-eval is given, as `llava-hvp eval` does for itself.

    Raises EvaluationError where there are results of a checkpoint that has changed since.
    """
    if step.column.harness != LMMS_HARNESS:
        return
    folder, digests = (
        _lmms_folder(out, model_path, step.row),
        digests_of(model_path, None, out / CACHE),
    )
    path = folder / "checkpoint.json"
    if any(folder.rglob("*_results.json")):
        why = difference(read_json(path) if path.exists() else None, digests)
        if why is not None:
            raise EvaluationError(
                f"{folder} holds results that may not be this checkpoint's: {why}. Move it away, "
                "or give --out another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, digests)


def environment(step: Step) -> dict[str, str]:
    """For the process of a step."""
    return {**os.environ, **step.environ}
