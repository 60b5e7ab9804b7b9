"""What the files of a checkpoint say of its vision tower, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_hvp.runtime import PruningConfig


def check_before_loading(model_path: str, prunings: Iterable[PruningConfig | None]) -> None:
    """Raise LayerError or OptionError for a method that the model of a checkpoint cannot have.

    Only files of this machine are read, Hugging Face's cache included. Where they do not tell a
    depth, the check after loading is the first.
    """
    model = _config(model_path)
    chosen = [pruning for pruning in prunings if pruning is not None]
    layers = model.get("num_hidden_layers")
    for pruning in chosen:
        if isinstance(layers, int):
            check_inside(pruning, layers)
    tower = _config(str(model.get("mm_vision_tower")))
    vision = tower.get("vision_config", tower)
    if not isinstance(vision, dict):
        return
    names = ("num_hidden_layers", "image_size", "patch_size")
    found: list[Any] = [*map(vision.get, names), model.get("mm_vision_select_layer")]
    if not all(isinstance(value, int) for value in found) or found[2] < 1:
        return
    depth, image, patch, select = found
    side = image // patch
    for pruning in chosen:
        pruning.method.needs(depth, select if select >= 0 else depth + 1 + select)
        pruning.method.check((side, side))


def check_inside(pruning: PruningConfig | None, layers: int) -> None:
    """Raise OptionError where what is inside a language model of so many layers cannot be met."""
    if pruning is not None and pruning.inside is not None:
        pruning.inside.check(layers)


def _config(name: str) -> dict[str, Any]:
    """The `config.json` of a folder or of a name on the hub; empty where it is not here."""
    folder = Path(name).expanduser()
    try:
        path = folder / "config.json" if folder.is_dir() else _cached(name)
        content = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cached(name: str) -> Path | None:
    """Raises ValueError for what is no name on the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
