"""What the files of a checkpoint say of its vision tower, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_hvp.checkpoints.form import is_transformers, read_config
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.runtime import PruningConfig


def check_before_loading(model_path: str, prunings: Iterable[PruningConfig | None]) -> None:
    """Raise a LlavaHvpError for a method that the model of a checkpoint cannot have.

    Only files of this machine are read, Hugging Face's cache included. Where they do not tell a
    depth, the check after loading is the first.
    """
    model = read_config(model_path)
    within = is_transformers(model_path)
    chosen = [pruning for pruning in prunings if pruning is not None]
    for pruning in chosen:
        check_language(model_path, pruning)
    tower = model if within else read_config(str(model.get("mm_vision_tower")))
    vision = tower.get("vision_config", tower)
    if not isinstance(vision, dict):
        return
    names = ("num_hidden_layers", "image_size", "patch_size")
    layer = "vision_feature_layer" if within else "mm_vision_select_layer"
    found: list[Any] = [*map(vision.get, names), model.get(layer)]
    if not all(isinstance(value, int) for value in found) or found[2] < 1:
        return
    depth, image, patch, select = found
    side = image // patch
    for pruning in chosen:
        pruning.method.needs(depth, select if select >= 0 else depth + 1 + select)
        pruning.method.check((side, side))


def check_llavas_form(model_path: str) -> None:
    """Raise UnsupportedModelError for a checkpoint that LLaVA's own scripts cannot load."""
    if is_transformers(model_path):
        raise UnsupportedModelError(
            f"--model-path {model_path} is in transformers' form, and LLaVA's own scripts answer "
            "here, which load LLaVA's: llava-hvp convert writes that form of it"
        )


def check_language(model_path: str, pruning: PruningConfig | None) -> None:
    """Raise a LlavaHvpError where what is inside a checkpoint's language model cannot be met."""
    config = read_config(model_path)
    if pruning is not None and is_transformers(model_path):
        from llava_hvp.hosts.hf.host import check_tiling

        check_tiling(pruning.runtime.tiling)
        config = config.get("text_config") or {}
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int):
        check_inside(pruning, layers)


def check_inside(pruning: PruningConfig | None, layers: int) -> None:
    """Raise OptionError where what is inside a language model of so many layers cannot be met."""
    if pruning is not None and pruning.inside is not None:
        pruning.inside.check(layers)
