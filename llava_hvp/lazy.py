"""`torch`, imported when it is first used: whoever lists methods and options waits for none of it.

`from llava_hvp.lazy import torch` is `import torch` with that difference.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """A module that is imported when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # from now on as fast as the module itself
        return value


if TYPE_CHECKING:
    import torch as torch
    from torch.nn import functional as functional
else:
    torch = _Lazy("torch")
    functional = _Lazy("torch.nn.functional")
