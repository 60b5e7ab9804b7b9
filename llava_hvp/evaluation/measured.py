"""Results files of a folder: ours, and those that lmms-eval wrote with our model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.benchmarks import BENCHMARKS
from llava_hvp.evaluation.files import RESULT, read_json
from llava_hvp.evaluation.model_args import OTHERS, pruning_of
from llava_hvp.evaluation.protocol import Protocol, counted, measured_protocol
from llava_hvp.evaluation.published import Column, has_stock_attention, with_stock_attention
from llava_hvp.evaluation.results import (
    KIND,
    MODEL,
    MODEL_METRIC,
    STOCK_HARNESS,
    TOWER,
    TOWER_METRIC,
)
from llava_hvp.runtime import PruningConfig

LMMS_HARNESS = "lmms-eval"
NO_OCR = "no OCR"
# lmms-eval's tasks that are benchmarks of LLaVA's scripts too.
TASKS = {
    "textvqa_val": "textvqa",
    "mmbench_en_dev": "mmbench",
    "mmbench_cn_dev": "mmbench_cn",
    "scienceqa_img": "scienceqa",
    "vizwiz_vqa_val": "vizwiz",
}
# What LLaVA's scorers call the number that lmms-eval's metric is.
SAME_NUMBER = {
    "mme_perception_score": "perception",
    "mme_perception_score+mme_cognition_score": "total",
    "pope_accuracy": "accuracy",
    "pope_f1_score": "f1",
    "gpt_eval_score": "circular_accuracy",
}


@dataclass(frozen=True)
class Measured:
    """One benchmark of one model, pruned one way.

    Parameters
    ----------
    benchmark : str
        its name here, lmms-eval's where only that has it
    variant : str
        what else tells two results apart, as OCR tokens in the prompts
    protocol : Protocol
        how it came about; what is not known is not stated there
    metrics : dict[str, float]
        as the harness gives them
    kept_tokens, kept_of_stock : float | None
        that enter a layer of the language model, averaged over all
    """

    benchmark: str
    harness: str
    model: str
    pruning: PruningConfig | None
    metric: str
    metrics: dict[str, float]
    path: Path
    kept_tokens: float | None = None
    kept_of_stock: float | None = None
    kept_of_patches: float | None = None
    ttft_ms: float | None = None
    tokens_per_second: float | None = None
    variant: str = ""
    protocol: Protocol = field(default_factory=Protocol)

    def value(self, column: Column) -> float | None:
        """The number that belongs in a column; None where this result has none of the kind."""
        if self.harness == column.harness:
            if self.variant == NO_OCR:
                return None
            values = [self.metrics.get(name) for name in column.metric.split("+")]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                return None
            return sum(known) * (100 if column.percent else 1)
        # lmms-eval's TextVQA has no OCR tokens in its prompts.
        alike = self.benchmark != "textvqa" or self.variant == NO_OCR
        if self.harness == STOCK_HARNESS and alike:
            name = SAME_NUMBER.get(column.metric, BENCHMARKS[self.benchmark].metric)
            return self.metrics.get(name)
        return None


def read_results(folder: Path, model: str | None = None) -> list[Measured]:
    """All results below a folder, the newest of each kind last.

    Parameters
    ----------
    model : str | None
        only of this one

    Raises EvaluationError where there is none, or of several models without `model`.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder}: there is no such folder")
    paths = sorted(
        {*folder.rglob(RESULT), *folder.rglob("*_results.json")}, key=lambda p: p.stat().st_mtime
    )
    found = [result for path in paths for result in _read(path)]
    models = sorted({result.model for result in found})
    if model is not None:
        if model not in models:
            there = ", ".join(models) or "none"
            raise OptionError(f"--model {model}: {folder} has results of {there}")
        return [result for result in found if result.model == model]
    if not found:
        raise EvaluationError(
            f"{folder} has no results: neither {RESULT} of `llava-hvp eval` nor *_results.json of "
            "lmms-eval with --model llava_hvp"
        )
    if len(models) > 1:
        raise EvaluationError(
            f"{folder} has results of {len(models)} models, {', '.join(models)}: give --model "
            f"{models[0]}, or the folder of one"
        )
    return found


def _read(path: Path) -> list[Measured]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is no results file: move it away")
    try:
        if content.get("kind") == KIND:
            return [_ours(content, path)]
        if content.get("config", {}).get("model") == "llava_hvp":
            return _lmms(content, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EvaluationError(
            f"{path} is a damaged results file ({type(error).__name__}: {error}): move it away"
        ) from error
    return []


def _ours(content: dict[str, Any], path: Path) -> Measured:
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (content["options"] or {}).items()
    }
    settings = content["settings"]
    pruned = content["options"] is not None
    pruning = PruningConfig.of(content["method"], **options) if pruned else None
    return Measured(
        content["benchmark"],
        content["harness"],
        content["model"],
        pruning,
        content["metric"],
        content["metrics"],
        path,
        # Results of before pruning inside the language model have no averages.
        content.get("average_tokens", content["kept_tokens"]),
        content.get("average_of_stock", content["kept_of_stock"]),
        content["kept_of_patches"],
        content["ttft_ms"],
        content["tokens_per_second"],
        NO_OCR if settings["without_ocr"] else "",
        measured_protocol(
            pruning,
            settings.get("model_path", content["model"]),
            tiling=settings.get("tiling", "stock"),
            dtype=content.get(MODEL, ""),
            tower=" ".join(content.get(name, "") for name in TOWER).strip(),
            mme=counted(content["benchmark"], content["metric"]),
        ),
    )


def _lmms(content: dict[str, Any], path: Path) -> list[Measured]:
    pairs = dict(pair.split("=", 1) for pair in content["config"]["model_args"].split(","))
    options = {key: value for key, value in pairs.items() if key not in (*OTHERS, "prune_method")}
    pruning = pruning_of(pairs.get("prune_method"), {k: _number(v) for k, v in options.items()})
    measured = content.get("throughput") or {}
    alone = len(content["results"]) == 1
    tower, dtype = (_kinds(measured, f"avg_{kind}") for kind in (TOWER_METRIC, MODEL_METRIC))
    found = []
    for task, values in content["results"].items():
        metrics = {
            # A task may filter answers in several ways; the last is what it reports.
            name.partition(",")[0]: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in name
        }
        prefix = "avg_" if alone else f"avg_{task}/"
        found.append(
            Measured(
                TASKS.get(task, task),
                LMMS_HARNESS,
                model_name(pairs["pretrained"]),
                pruning,
                next(iter(metrics), ""),
                metrics,
                path,
                measured.get(f"{prefix}average_tokens", measured.get(f"{prefix}kept_tokens")),
                measured.get(f"{prefix}average_of_stock", measured.get(f"{prefix}kept_of_stock")),
                measured.get(f"{prefix}kept_of_patches"),
                measured.get(f"{prefix}ttft_ms"),
                measured.get(f"{prefix}tokens_per_second"),
                protocol=measured_protocol(
                    pruning,
                    pairs["pretrained"],
                    tiling=pairs.get("tiling", "stock"),
                    dtype=dtype,
                    tower=tower,
                    mme=counted(TASKS.get(task, task), next(iter(metrics), "")),
                ),
            )
        )
    return found


def _kinds(measured: dict[str, Any], prefix: str) -> str:
    """What stands in the names of numbers, as `precisions` writes it."""
    return ", ".join(sorted(n.removeprefix(prefix) for n in measured if n.startswith(prefix)))


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def find(
    results: Sequence[Measured], column: Column, pruning: PruningConfig | None
) -> tuple[Measured, float] | None:
    """The result for a column, and its number; None where there is none of this method.

    Of the column's harness if there is one, then with the attention of the released codes, then the
    newest.
    """
    fitting = []
    for result in results:
        value = result.value(column)
        alike = with_stock_attention(result.pruning) == with_stock_attention(pruning)
        if result.benchmark == column.benchmark and alike and value is not None:
            rank = result.harness == column.harness, has_stock_attention(result.pruning)
            fitting.append((rank, result, value))
    if not fitting:
        return None
    most = max(rank for rank, _, _ in fitting)
    *_, (_, result, value) = (each for each in fitting if each[0] == most)
    return result, value
