"""Which LLaVA and transformers are supported, and the gaps between them, bridged where they are.

`prune` bridges the one model that it is given; `builder.install` bridges loading as well. `bridge`
does both for a stock, unpruned LLaVA, and `unbridge` takes it back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llava_hvp.errors import UnsupportedVersionError
from llava_hvp.host.patches import Patches

OLDEST, NEWEST = (4, 36), (6, 0)  # transformers, the second excluded
SUPPORTED = (
    "supported are llava-torch 1.2.2.post1 (PyPI) and LLaVA 1.2.2.post1 (GitHub) with "
    "transformers >= 4.36, < 6 (tested: 4.37.2, 4.57.6, 5.23.0)"
)
# What the stock method takes since LLaVA 1.2; forks of later years take more.
STOCK_PARAMETERS = (
    "self",
    "input_ids",
    "position_ids",
    "attention_mask",
    "past_key_values",
    "labels",
    "images",
    "image_sizes",
)


def found_versions() -> dict[str, str]:
    """Versions of what matters: llava (with where it lies), transformers, torch."""
    versions = {name: _version(name) for name in ("torch", "transformers")}
    spec = importlib.util.find_spec("llava")
    names = [n for n in ("llava-torch", "llava") if _version(n) != "none"]
    found = ", ".join(f"{n} {_version(n)}" for n in names) or "no distribution"
    where = "missing" if spec is None else f"at {(spec.submodule_search_locations or ['?'])[0]}"
    return versions | {"llava": f"{found} {where}"}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def transformers_version() -> tuple[int, int]:
    """(major, minor) of the installed transformers; (0, 0) where there is none."""
    version = _version("transformers")
    if version == "none":
        return 0, 0
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def check_versions() -> None:
    """Raise UnsupportedVersionError unless LLaVA and transformers are ones that we know."""
    if not OLDEST <= transformers_version() < NEWEST:
        raise _unsupported(f"transformers {_version('transformers')}")
    if importlib.util.find_spec("llava") is None:
        raise _unsupported("no module `llava`", "pip install --no-deps llava-torch==1.2.2.post1")
    try:
        arch = importlib.import_module("llava.model.llava_arch")
        stock = arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
    except (ImportError, AttributeError) as error:
        raise _unsupported(f"a `llava` that does not import: {_reason(error)}") from error
    parameters = tuple(inspect.signature(stock).parameters)
    if parameters != STOCK_PARAMETERS:
        raise _unsupported(
            f"a `llava` ({found_versions()['llava']}) whose prepare_inputs_labels_for_multimodal "
            f"takes {', '.join(parameters[1:])}"
        )


def _unsupported(found: str, remedy: str = "") -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"found {found}; {SUPPORTED}" + (f". Try: {remedy}" * bool(remedy))
    )


def _reason(error: BaseException) -> str:
    """Why `import llava` fails: its own `except: pass` hides that behind a later ImportError."""
    spec = importlib.util.find_spec("llava")
    saved = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "llava"}
    for name in saved:
        del sys.modules[name]
    bare = types.ModuleType("llava")
    bare.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    model = types.ModuleType("llava.model")
    model.__path__ = [f"{folder}/model" for folder in bare.__path__]
    sys.modules |= {"llava": bare, "llava.model": model}
    try:
        importlib.import_module("llava.model.language_model.llava_llama")
    except Exception as hidden:  # whatever it is, it is the answer
        return f"{type(hidden).__name__}: {hidden}"
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "llava"]:
            del sys.modules[name]
        sys.modules |= saved
    return str(error)


# --- generation: arguments that LLaVA's forward does not take (transformers 4.38 to 4.57) ---


def prepare_inputs_for_generation(
    self: Any, input_ids: Any, past_key_values: Any = None, inputs_embeds: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """As stock, less `cache_position`, which LLaVA's forward refuses and Llama's works out itself.

    `generate` looks for `inputs_embeds` by name among the parameters.
    """
    inputs = _stock_preparation(type(self))(
        self, input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
    )
    if "cache_position" not in inspect.signature(type(self).forward).parameters:
        inputs.pop("cache_position", None)
    return inputs


def _stock_preparation(kind: type) -> Callable[..., dict[str, Any]]:
    """The class's own method, whether or not `bridge` stands before it."""
    method = kind.prepare_inputs_for_generation  # type: ignore[attr-defined]
    return getattr(method, "stock", method)


def _class_bridge(kind: type) -> Callable[..., dict[str, Any]]:
    """`prepare_inputs_for_generation` for the class itself, which remembers the stock one."""

    @functools.wraps(prepare_inputs_for_generation)
    def prepared(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return prepare_inputs_for_generation(self, *args, **kwargs)

    prepared.stock = _stock_preparation(kind)  # type: ignore[attr-defined]
    return prepared


def instance_bridges() -> tuple[Callable[..., Any], ...]:
    """Methods to bind to a LLaVA model so that it generates under this transformers."""
    return (prepare_inputs_for_generation,) if transformers_version() >= (4, 38) else ()


# --- loading: a tower inside the LLaVA checkpoint, as v1.6 has it ---


class LateCLIPVisionModel:
    """Stands in for `CLIPVisionModel` where LLaVA builds its tower.

    While transformers 5 builds the LLaVA model on the meta device, nested loading is refused; the
    tower is then made without weights, which the LLaVA checkpoint brings.
    """

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        if torch.empty(0).device.type == "meta":
            return CLIPVisionModel(CLIPVisionConfig.from_pretrained(name))
        return CLIPVisionModel.from_pretrained(name, **kwargs)


def _loading(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained` that never leaves a tower with made-up weights.

    What the LLaVA checkpoint does not hold of the tower comes from the tower's own checkpoint.
    Stock would go on with uninitialised memory (transformers 4) or random weights (5), silently.
    """

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = stock(cls, *args, output_loading_info=True, **kwargs)
        prefix = "model.vision_tower.vision_tower."
        missing = [key for key in report["missing_keys"] if key.startswith(prefix)]
        if missing:
            from transformers import CLIPVisionModel

            tower = model.get_vision_tower()
            own = CLIPVisionModel.from_pretrained(tower.vision_tower_name).state_dict()
            wanted = {key.removeprefix(prefix) for key in missing}
            tower.vision_tower.load_state_dict(
                {key: value for key, value in own.items() if key in wanted}, strict=False
            )
        return (model, report) if wants_report else model

    return from_pretrained


def bridge_loading(patches: Patches) -> None:
    """Add to `patches` what the stock loader needs under this transformers."""
    if transformers_version() >= (5, 0):
        clip_encoder = importlib.import_module("llava.model.multimodal_encoder.clip_encoder")
        patches.replace(clip_encoder, "CLIPVisionModel", LateCLIPVisionModel)
    for kind in llava_models():
        stock = kind.from_pretrained.__func__  # type: ignore[attr-defined]
        patches.replace(kind, "from_pretrained", classmethod(_loading(stock)))


def llava_models() -> list[type]:
    """LLaVA's model classes that are imported: Llama, Mistral, MPT and subclasses."""
    arch = importlib.import_module("llava.model.llava_arch")
    importlib.import_module("llava.model")
    found, queue = [], [arch.LlavaMetaForCausalLM]
    while queue:
        kinds = queue.pop().__subclasses__()
        queue += kinds
        found += kinds
    return found


_BRIDGED = Patches()


def bridge() -> None:
    """Make stock, unpruned LLaVA load and generate under this transformers. Twice is as once."""
    check_versions()
    if _BRIDGED:
        return
    bridge_loading(_BRIDGED)
    for kind in llava_models() if instance_bridges() else ():
        _BRIDGED.replace(kind, "prepare_inputs_for_generation", _class_bridge(kind))


def unbridge() -> None:
    """Take `bridge` back; nothing happens where it was not called."""
    _BRIDGED.undo()


@contextlib.contextmanager
def bridged() -> Iterator[None]:
    """`bridge` for a block."""
    bridge()
    try:
        yield
    finally:
        unbridge()
