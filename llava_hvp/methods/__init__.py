"""The methods. Each file of this folder is one; a new file is found without a list to edit."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from llava_hvp.errors import OptionError
from llava_hvp.methods.base import Method

NONE = "none"  # the word for unpruned LLaVA, which is no method

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)


def _registry() -> dict[str, type[Method]]:
    found, queue = {}, [Method]
    while queue:
        kinds = queue.pop().__subclasses__()
        queue += kinds
        found.update({k.name: k for k in kinds if "name" in vars(k) and k.listed})
    return found


def list_methods() -> list[str]:
    """Names of all methods, sorted; a subclass of Method defined elsewhere is listed too."""
    return sorted(_registry())


def method_class(name: str) -> type[Method]:
    """The class behind a name; raises OptionError with the valid names."""
    registry = _registry()
    if name == NONE:
        raise OptionError(
            f"{NONE} is unpruned LLaVA and no method: leave the model as it is (newer transformers "
            "need llava_hvp.host.compat.bridge() before the load), or give one of "
            + ", ".join(sorted(registry))
        )
    if name not in registry:
        raise OptionError(f"unknown method {name!r}: give one of {', '.join(sorted(registry))}")
    return registry[name]


def get_method(name: str, **options: Any) -> Method:
    """A method by name, as `get_method("hivtp", r_max=0.5)`.

    Raises OptionError for an unknown name, option or value; the message lists the valid ones.
    """
    kind = method_class(name)
    valid = [f.name for f in dataclasses.fields(kind)]
    for option in options:
        if option not in valid:
            raise OptionError(f"{name}: unknown option {option!r}: give one of {', '.join(valid)}")
    return kind(**options)
