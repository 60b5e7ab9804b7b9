"""Which LLaVA and transformers are supported, and which are here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types

from llava_hvp.errors import UnsupportedVersionError
from llava_hvp.version import release_of, version_of

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
    return version_of(distribution) or "none"


def transformers_version() -> tuple[int, int]:
    """(major, minor) of the installed transformers; (0, 0) where there is none."""
    return release_of(version_of("transformers"))


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
