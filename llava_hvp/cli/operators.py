"""What DeepSpeed compiles on its first use, found without importing it."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from llava_hvp.lazy import torch

# A compilation leaves a lock while it runs, and for ever where it is killed.
_STALE = 600  # seconds in which nothing was written beside it
_OFFLOAD = {"cpu_adam": "offload to the CPU"}
_OPERATORS = {"cpu": {"deepspeed_shm_comm": "ranks of one machine"} | _OFFLOAD, "cuda": _OFFLOAD}


def accelerator() -> str:
    """Where DeepSpeed would run, by its own rule."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return os.environ.get("DS_ACCELERATOR") or found


def uncompiled() -> dict[str, str]:
    """Operators that would be compiled on their first use, each with what needs it."""
    spec = importlib.util.find_spec("deepspeed")
    folders = [_builds(), *map(Path, (spec.submodule_search_locations or ()) if spec else ())]

    def is_there(name: str) -> bool:
        return any(True for folder in folders for _ in folder.rglob(f"{name}*.so"))

    needed = _OPERATORS.get(accelerator(), {})
    return {name: uses for name, uses in needed.items() if not is_there(name)}


def stale_locks() -> list[Path]:
    """Locks of compilations that are running no more; whoever needs the operator waits for them."""
    now = time.time()
    return [
        lock
        for lock in sorted(_builds().rglob("lock"))
        if now - max(file.stat().st_mtime for file in lock.parent.iterdir()) > _STALE
    ]


def _builds() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions"
    return Path(given).expanduser()
