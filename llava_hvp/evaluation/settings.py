"""What a run was asked, in a form that the next start of it can be compared with."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_hvp import config
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.config import Request
from llava_hvp.evaluation.benchmarks import Benchmark
from llava_hvp.evaluation.digests import digests_of
from llava_hvp.evaluation.questions import Questions
from llava_hvp.runtime import PruningConfig, Runtime
from llava_hvp.version import __version__, installed

UNPRUNED = "unpruned"


def settings_of(
    benchmark: Benchmark,
    request: Request,
    *,
    model_path: str,
    model_base: str | None,
    stock: Sequence[str],
    questions: Questions,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Everything that answers depend on; how many processes there are is not among it.

    Parameters
    ----------
    cache : Path | None
        as `digests_of` takes it
    """
    pruning = request.pruning
    return {
        "benchmark": benchmark.name,
        "model_path": model_path,
        "model_base": model_base,
        "checkpoint": digests_of(model_path, model_base, cache),
        "method": None if pruning is None else pruning.spec,
        "options": None if pruning is None else plain(pruning.options),
        "tiling": (Runtime() if pruning is None else pruning.runtime).tiling,
        "given": config.to_flags(Request(pruning)),
        **({} if pruning is None else pruning.source),
        "device": request.device or "cuda",
        "arguments": list(stock),
        "questions": questions.path.name,
        "questions_sha256": questions.sha256,
        "without_ocr": questions.changed,
        "versions": versions(),
    }


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def versions() -> dict[str, str]:
    """Versions of what takes part, without importing it."""
    others = installed("torch", "transformers", "llava-torch", "llava")
    return {"llava-hvp": __version__, "python": platform.python_version(), **others}


def method_name(pruning: PruningConfig | None) -> str:
    """As a folder: `hivtp-r_max-0.5`."""
    text = UNPRUNED if pruning is None else str(pruning)
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def is_next(model_path: str) -> bool:
    """Whether this is LLaVA-1.6 (NeXT), by its config where it lies here, else by its name."""
    path = Path(model_path).expanduser() / "config.json"
    if path.is_file():
        return '"anyres' in path.read_text()
    return bool(re.search(r"1\.6|next", model_name(model_path), re.IGNORECASE))
