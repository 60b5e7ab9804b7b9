"""The entry point: while installed, the stock loader gives pruned models."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_hvp.encoder.text import ClipText
from llava_hvp.errors import PrunedStateError, UnsupportedModelError
from llava_hvp.hosts.llava import compat
from llava_hvp.hosts.llava.host import bind
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.methods.base import Method
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.pruning import Pruning
from llava_hvp.runtime import PruningConfig, Runtime

_INSTALLED = MonkeyPatcher()
_CHANGING = threading.Lock()  # of two threads one comes first


def install(
    method: Method | PruningConfig,
    inside: LanguageMethod | None = None,
    *,
    runtime: Runtime | None = None,
    tokenizer: Any = None,
    clip_text: str | Path | ClipText | None = None,
    on_model: Callable[[Pruning], None] | None = None,
) -> None:
    """From now on `load_pretrained_model` and `build_vision_tower` give what `prune` would.

    It does not matter who imported them before. Models loaded so stay pruned after `uninstall`;
    `unprune(model)` gives a stock one.

    Parameters
    ----------
    method : Method
        what to prune by
    inside : LanguageMethod | None
        a second method, inside the language model
    runtime : Runtime | None
        how to run it, by default `Runtime()`
    tokenizer : Any
        for prompt-aware methods; by default they load the checkpoint's own
    clip_text : str | Path | ClipText | None
        as for `prune`
    on_model : Callable[[Pruning], None] | None
        called with the `Pruning` of each model that is built

    Raises
    ------
    PrunedStateError
        a method is installed already
    UnsupportedVersionError
        this LLaVA or transformers is not supported
    """
    compat.check_versions()
    chosen = PruningConfig.checked(method, runtime, inside)
    with _CHANGING:
        if _INSTALLED:
            raise PrunedStateError("a method is installed already: call uninstall() first")
        towers = importlib.import_module("llava.model.multimodal_encoder.builder")
        tower = functools.partial(PrunedCLIPVisionTower, pruning=chosen)
        _INSTALLED.replace(towers, "CLIPVisionTower", tower)
        if hasattr(towers, "CLIPVisionTowerS2"):
            _INSTALLED.replace(towers, "CLIPVisionTowerS2", _refuse_s2)
        compat.bridge_loading(_INSTALLED)
        for kind in compat.llava_models():
            stock = vars(kind).get("__init__")
            if stock is not None:
                init = _binding(stock, chosen, tokenizer, clip_text, on_model)
                _INSTALLED.replace(kind, "__init__", init)


def uninstall() -> None:
    """The stock loader gives stock models again; raises PrunedStateError if it does already."""
    with _CHANGING:
        if not _INSTALLED:
            raise PrunedStateError("no method is installed: nothing to undo")
        _INSTALLED.undo()


def _refuse_s2(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "this checkpoint has an S2 vision tower, which has no one grid of patches: pruning "
        "supports CLIPVisionTower"
    )


def _binding(
    stock: Callable[..., None],
    chosen: PruningConfig,
    tokenizer: Any,
    clip_text: str | Path | ClipText | None,
    on_model: Callable[[Pruning], None] | None,
) -> Callable[..., None]:
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_form(kwargs.get("config", args[0] if args else None))
        stock(self, *args, **kwargs)
        if "llava_hvp" not in vars(self):
            pruning = bind(self, chosen, tokenizer, clip_text)
            if on_model is not None:
                on_model(pruning)

    return init


def _check_form(config: Any) -> None:
    """Raise UnsupportedModelError for a checkpoint of transformers' own LLaVA classes.

    LLaVA's loader would fail somewhere inside on it, or fill a whole model with random weights.
    """
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            "this checkpoint is in the form of transformers' own classes, which LLaVA's loader "
            "cannot read: write LLaVA's form of it by `llava-hvp convert FOLDER NEW_FOLDER`, or "
            "load it by AutoModelForImageTextToText under `llava-hvp run`"
        )
