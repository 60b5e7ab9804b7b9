"""The methods. Each file of this folder is one; a new file is found without a list to edit.

A method of somebody else's is found by `module:Class`, or by the name that its package gives it in
the entry-point group `llava_hvp.methods`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods.base import Method

ENTRY_POINTS = "llava_hvp.methods"
NONE = "none"  # the word for unpruned LLaVA, which is no method
# Options of llava_hvp.Runtime, which lies above the methods.
OF_RUNTIME = ("tiling", "patch_merge", "newline", "tower_attention", "tower_dtype")
_NAME = re.compile(r"[\w.+-]+")  # for lists, key=value pairs and folders

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)


def _registry() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    queue: list[Any] = [Method]
    while queue:
        kinds = queue.pop().__subclasses__()
        queue += kinds
        for kind in kinds:
            # Ours were imported first, so that nobody takes a paper's name from it.
            has_name = "name" in vars(kind) and hasattr(kind, "where")
            if has_name and kind.listed and not inspect.isabstract(kind):
                found.setdefault(kind.name, kind)
    return found


@functools.cache
def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """Methods that installed packages name, not imported yet."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def list_methods(kind: type[Method] = Method) -> list[str]:
    """Names of all methods of a kind, sorted; a subclass defined elsewhere is listed too."""
    names = sorted({*_registry(), *_plugins()})
    return names if kind is Method else [n for n in names if issubclass(method_class(n), kind)]


def method_class(name: str) -> type[Method]:
    """The class behind a name, or behind `module:Class`.

    Raises
    ------
    OptionError
        there is none, or it is no method; the message lists the valid names
    """
    registry = _registry()
    if name == NONE:
        raise OptionError(
            f"{NONE} is unpruned LLaVA and no method: leave the model as it is (newer transformers "
            "need llava_hvp.hosts.llava.compat.bridge() before the load), or give one of "
            + ", ".join(list_methods())
        )
    if name in registry:
        return registry[name]
    if name in _plugins():
        return _own(_plugins()[name].value, f"{name!r}, which an installed package names,")
    if ":" in name:
        return _own(name, shown(name))
    raise OptionError(
        f"unknown method {shown(name)}: {nearest(name, list_methods())}give one of "
        f"{', '.join(list_methods())}, or one of your own as mymodule:MyMethod"
    )


def method_spec(kind: type[Method]) -> str:
    """The name by which `method_class` finds a class again, in another process too."""
    plugin = _plugins().get(kind.name)
    path = f"{kind.__module__}:{kind.__qualname__}"
    is_known = kind.__module__.startswith("llava_hvp.") or (plugin and plugin.value == path)
    return kind.name if is_known else path


def source_of(kind: type[Method]) -> dict[str, str]:
    """What tells two versions of somebody's own method apart: the digest of its file.

    Nothing for a method of ours, which this package's version tells.
    """
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if kind.__module__.startswith("llava_hvp.") or path is None or not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        return {"method_sha256": hashlib.sha256(file.read()).hexdigest()}


def folder_of(kind: type[Method]) -> str | None:
    """The current folder, where it is there that somebody's own method was found; else None."""
    name, here = kind.__module__.partition(".")[0], _here()
    module = sys.modules.get(name)
    places = getattr(module, "__path__", None) or [getattr(module, "__file__", None) or ""]
    is_here = here in [os.path.dirname(os.path.abspath(place)) for place in places]
    return here if is_here and name != "llava_hvp" else None


def get_method(name: str, **options: Any) -> Method:
    """A method by name, as `get_method("hivtp", r_max=0.5)`, or by `module:Class`.

    Raises OptionError for an unknown name, option or value; the message lists the valid ones.
    """
    kind = method_class(name)
    for option in OF_RUNTIME:
        if option in options:
            raise OptionError(
                f"{name}: {option} says how the model runs and not what is chosen: give it as "
                f"runtime=Runtime({option}={options[option]!r}) to llava_hvp.prune"
            )
    check_known(name, options, [field.name for field in dataclasses.fields(kind)])
    return kind(**options)


def check_known(name: str, options: Iterable[str], valid: Sequence[str]) -> None:
    """Raise OptionError for an option that the method of this name does not have."""
    for option in options:
        if option not in valid:
            raise OptionError(
                f"{name}: unknown option {shown(option)}: {nearest(option, valid)}give one of "
                f"{', '.join(valid)}"
            )


def nearest(word: str, valid: Sequence[str]) -> str:
    """As `did you mean hivtp? `, of words like a wrong one; "" where none is like it."""
    alike = difflib.get_close_matches(str(word).lower(), valid, n=2)
    return f"did you mean {' or '.join(alike)}? " if alike else ""


def _own(path: str, called: str) -> type[Method]:
    """The class at `module:Class`; raises OptionError, with why."""
    module, _, attribute = path.partition(":")
    try:
        kind: Any = _imported(module)
        for part in attribute.split("."):
            kind = getattr(kind, part)
    # Whatever a module of somebody else's does while it is imported, sys.exit included.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(
            f"the method {called} cannot be had: {reason}. Give "
            "module:Class of a module that can be imported, or that lies in "
            f"{_here() or 'this folder'}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise OptionError(f"the method {called} is no subclass of llava_hvp.VisionMethod")
    if not hasattr(kind, "where"):
        raise OptionError(f"the method {called} is of no kind: build on llava_hvp.VisionMethod")
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(vars(kind)["__abstractmethods__"]))
        raise OptionError(f"the method {called} is abstract: it lacks {missing}")
    own = vars(kind)
    if not all((own.get("name"), own.get("summary"), getattr(kind, "roles", None))):
        raise OptionError(f"the method {called} lacks a name, a summary or roles of its own")
    if not _NAME.fullmatch(str(kind.name)) or kind.name == NONE:
        raise OptionError(
            f"the method {called} calls itself {kind.name!r}: give a name of letters, digits, . + -"
        )
    if _registry().get(kind.name) is not kind:
        raise OptionError(
            f"the method {called} calls itself {kind.name!r}, as another does: rename"
        )
    return kind


def _imported(module: str) -> Any:
    """Import a module, from the folder that the command was started in if need be."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        here = _here()
        if error.name != module.split(".")[0] or here is None or here in sys.path:
            raise
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the folder is gone
        return None
