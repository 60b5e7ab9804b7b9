"""The model `llava_hvp` of lmms-eval, found by its entry point."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks a plugin for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_hvp", simple_class_path="llava_hvp.lmms.model.LlavaHvp")
