"""What `from_pretrained` of transformers' own LLaVA classes loads is pruned, the rest counted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from llava_hvp.errors import UnsupportedModelError, UnsupportedVersionError
from llava_hvp.hosts.hf.families import FAMILIES
from llava_hvp.hosts.hf.host import attach
from llava_hvp.hosts.hf.qwen.capture import is_recording
from llava_hvp.hosts.hf.versions import check_release
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.pruning import Pruning
from llava_hvp.runtime import PruningConfig

ENDING = "ForConditionalGeneration"  # of a class's name; the model inside ends in Model instead


def install(
    patches: MonkeyPatcher,
    module: Any,
    pruning: PruningConfig | None,
    *,
    before: Callable[[], None],
    on_model: Callable[[Pruning], None],
    on_unpruned: Callable[[int], None],
    on_images: Callable[[Any, int, int], None],
) -> list[type]:
    """Prune whatever the classes of a module load from now on; return the classes.

    On a release whose classes are not pruned, a model of them raises UnsupportedVersionError.

    Parameters
    ----------
    module : Any
        of transformers, as `transformers.models.llava.modeling_llava`
    pruning : PruningConfig | None
        None to leave models as they are, and tell of their images
    before : Callable[[], None]
        called when a model is about to be loaded
    on_model : Callable[[Pruning], None]
        called with each that was loaded
    on_unpruned : Callable[[int], None]
        called with a number of images that a model is about to encode which nobody prunes
    on_images : Callable[[Any, int, int], None]
        where `pruning` is None, called with what has encoded, its images, and their visual tokens
    """
    changed: list[type] = []
    for name in FAMILIES:
        kind = vars(module).get(name)
        if kind is None:
            continue
        try:
            check_release()
        except UnsupportedVersionError:
            patches.replace(kind, "__init__", _refused)
            continue
        inner = getattr(module, name.removesuffix(ENDING) + "Model")
        stock = inner.get_image_features
        if pruning is None:
            patches.replace(inner, "get_image_features", _telling(stock, on_images))
        else:
            loader = _pruning(kind.from_pretrained.__func__, pruning, before, on_model)
            patches.replace(kind, "from_pretrained", classmethod(loader))
            patches.replace(inner, "get_image_features", _warning(stock, on_unpruned))
            if hasattr(inner, "get_video_features"):
                patches.replace(inner, "get_video_features", _refused_videos)
        changed += [kind, inner]
    return changed


def _refused(model: Any, *args: Any, **kwargs: Any) -> None:
    check_release()


def _refused_videos(inner: Any, *args: Any, **kwargs: Any) -> None:
    """Stands in for stock's `get_video_features`, of whoever calls it."""
    raise UnsupportedModelError(
        f"a video for {type(inner).__name__}: videos are not pruned: give the frames as images, or "
        "run without pruning"
    )


def _pruning(
    stock: Callable[..., Any],
    pruning: PruningConfig,
    before: Callable[[], None],
    on_model: Callable[[Pruning], None],
) -> Callable[..., Any]:
    """Stock's `from_pretrained`; what it gives is pruned, or an error."""

    @functools.wraps(stock)
    def from_pretrained(kind: type, *args: Any, **kwargs: Any) -> Any:
        before()
        loaded = stock(kind, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        on_model(attach(model, **pruning.arguments))
        return loaded

    return from_pretrained


def _warning(stock: Callable[..., Any], on_unpruned: Callable[[int], None]) -> Callable[..., Any]:
    """Stock's `get_image_features`, which a pruned model calls only to read its tower."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        if not is_recording():
            given = signature.bind(*args, **kwargs).arguments
            grids = given.get("image_grid_thw")  # pixels of Qwen2.5-VL are rows of patches
            on_unpruned(len(given["pixel_values"] if grids is None else grids))
        return stock(*args, **kwargs)

    return get_image_features


def _telling(
    stock: Callable[..., Any], on_images: Callable[[Any, int, int], None]
) -> Callable[..., Any]:
    """Stock's `get_image_features`, of which somebody is told."""

    @functools.wraps(stock)
    def get_image_features(inner: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(inner, pixel_values, *args, **kwargs)
        features: list[Tensor] | Tensor = getattr(found, "pooler_output", found)
        on_images(inner, len(features), sum(len(tokens) for tokens in features))
        return found

    return get_image_features
