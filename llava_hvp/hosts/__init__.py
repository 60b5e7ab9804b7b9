"""The frameworks whose models can be pruned, a folder each. Importing this imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llava_hvp.errors import PrunedStateError, UnsupportedModelError

# Host -> classes of which each of its models, or what encodes in it, has one among its bases.
MARKS = {
    "llava": ("LlavaMetaForCausalLM",),
    "hf": (
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "LlavaModel",
        "LlavaNextModel",
        "LlavaOnevisionModel",
        "Qwen2_5_VLModel",
    ),
}


def host_of(model: Any) -> Any:
    """The module `host` of the framework that a model, or one inside a wrapper, is of.

    Raises UnsupportedModelError where there is none.
    """
    for part in _parts(model):  # the model itself comes first, and mostly is it
        names = {kind.__name__ for kind in type(part).__mro__}
        for host, marks in MARKS.items():
            if not names.isdisjoint(marks):
                return importlib.import_module(f"{__name__}.{host}.host")
    raise unknown(model)


def find(model: Any, is_ours: Callable[[Any], bool]) -> Any:
    """A host's model in what the user holds: itself, or inside a wrapper (PEFT, DDP).

    Raises UnsupportedModelError where there is none.
    """
    for part in _parts(model):
        if is_ours(part):
            return part
    raise unknown(model)


def check_unpruned(pruned: bool, part: Any, overrides: Iterable[str]) -> None:
    """Raise PrunedStateError for a model that is pruned already, or patched by something else.

    Parameters
    ----------
    part : Any
        what the overrides are put on
    """
    if pruned:
        raise PrunedStateError(
            "this model is pruned already: unprune(model) first, or leave its `with` block"
        )
    patched = [name for name in overrides if name in vars(part)]
    if patched:
        raise PrunedStateError(
            f"{', '.join(patched)} of this model is patched by something else: undo that first"
        )


def pruning_of(model: Any) -> Any:
    """The `Pruning` of a host's model; raises PrunedStateError where there is none."""
    pruning = vars(model).get("llava_hvp")
    if pruning is None:
        raise PrunedStateError("this model is not pruned: nothing to undo")
    return pruning


def unknown(model: Any) -> UnsupportedModelError:
    """The error for a model of no framework that is known here."""
    return UnsupportedModelError(
        f"{type(model).__name__} is not a LLaVA model: give what llava.model.builder."
        "load_pretrained_model returns, or transformers' own LlavaForConditionalGeneration, "
        "LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration or "
        "Qwen2_5_VLForConditionalGeneration"
    )


def _parts(model: Any) -> Iterator[Any]:
    yield model
    modules = getattr(model, "modules", None)
    if callable(modules):
        yield from modules()
