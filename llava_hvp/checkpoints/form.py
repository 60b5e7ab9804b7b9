"""In which form a checkpoint lies: LLaVA's own, or that of transformers' classes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

# Beginnings of transformers' class names -> the model types in their configs.
FAMILIES = {"Llava": "llava", "LlavaNext": "llava_next"}


def is_transformers(name: str | Path) -> bool:
    """Whether a checkpoint is in the form of transformers' own classes."""
    config = read_config(name)
    # LLaVA's own form has had the model type "llava" too.
    return config.get("model_type") in FAMILIES.values() and "mm_vision_tower" not in config


def read_config(name: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder, or of a name whose files are here; else empty."""
    folder = Path(name).expanduser()
    try:
        path = folder / "config.json" if folder.is_dir() else _cached(str(name))
        content = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def fetch_config(name: str) -> None:
    """Have the `config.json` of a name on the hub here, for `read_config`, if it can be had."""
    from huggingface_hub import hf_hub_download

    if Path(name).expanduser().is_dir() or read_config(name):
        return
    with contextlib.suppress(Exception):  # whoever loads the checkpoint says what is wrong
        hf_hub_download(name, "config.json")


def _cached(name: str) -> Path | None:
    """In Hugging Face's cache; raises ValueError for what is no name on the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
