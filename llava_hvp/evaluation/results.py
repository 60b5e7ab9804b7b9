"""The results file of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_hvp.checkpoints.naming import model_name
from llava_hvp.evaluation.benchmarks import Benchmark
from llava_hvp.evaluation.settings import UNPRUNED
from llava_hvp.evaluation.store import Store
from llava_hvp.pruning.record import answers_facts

if TYPE_CHECKING:
    from llava_hvp.evaluation.scores import Score

KIND = "llava-hvp result"
STOCK_HARNESS = "llava.eval"
VISUAL = (
    *("kept_tokens", "stock_tokens", "average_tokens"),
    *("kept_of_stock", "average_of_stock", "kept_of_patches"),
)
TOWER_METRIC = "vision tower "
MODEL_METRIC = "model "
MODEL = "model_dtype"
TOWER = ("vision_tower_dtype", "vision_tower_attention")


def make_result(
    benchmark: Benchmark,
    settings: dict[str, Any],
    found: Score,
    store: Store,
    notes: Sequence[str],
    *,
    command: str,
) -> dict[str, Any]:
    """The content of `result.json`.

    value : the benchmark's number; None where only its server knows it
    """
    calls = [answer.call for answer in store.in_order if answer.call is not None]
    return {
        "kind": KIND,
        "benchmark": benchmark.name,
        "harness": STOCK_HARNESS,
        "metric": benchmark.metric,
        "value": found.metrics.get(benchmark.metric),
        "metrics": found.metrics,
        "scorer": found.scorer,
        "upload": None if found.upload is None else found.upload.name,
        "model": model_name(settings["model_path"]),
        "method": settings["method"] or UNPRUNED,
        "options": settings["options"],
        "tiling": settings["tiling"],
        "given": settings["given"],
        "questions": len(store.questions),
        **visual_tokens(calls),
        **speed(calls),
        **{
            name: ", ".join(sorted({c[name] for c in calls if c.get(name)}))
            for name in (MODEL, *TOWER)
        },
        "notes": list(notes),
        "answers": answers_facts(store.answers_file),
        "settings": settings,
        "versions": settings["versions"],
        "command": command,
    }


def visual_tokens(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over images, as the papers count; None where no image was seen."""
    images = sum(call["images"] for call in calls)
    return {
        "images": images,
        **{name: sum(call[name] for call in calls) / images if images else None for name in VISUAL},
    }


def precisions(calls: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How the model and its vision tower ran, as numbers: lmms-eval keeps nothing else.

    Each is a share of all calls.
    """
    kinds = [MODEL_METRIC + call[MODEL] for call in calls]
    kinds += [TOWER_METRIC + " ".join(call[name] for name in TOWER) for call in calls]
    return {kind: kinds.count(kind) / len(calls) for kind in kinds}


def speed(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time to first token (mean over calls with an image) and tokens/s of all `generate` calls.

    The call in which a process is slowest, its first, is left out where there are others: on a GPU
    it compiles and allocates.
    """
    with_image = [call for call in calls if call["images"]]
    steady = [call for call in with_image if not call.get("warmup")] or with_image
    seconds = sum(call["seconds"] for call in steady)
    return {
        "ttft_ms": 1e3 * sum(c["first_token"] for c in steady) / len(steady) if steady else None,
        "tokens_per_second": sum(c["tokens"] for c in steady) / seconds if seconds else None,
        "measured_calls": len(steady),
    }
