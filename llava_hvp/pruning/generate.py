"""`generate` of one model: the host's own, which takes `prune=` for a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llava_hvp.pruning.pruning import Pruning


class Generate:
    """Stands in for a model's `generate`; its signature is stock's.

    Parameters
    ----------
    pruning : Pruning
        of the model
    earlier : Callable[..., Any] | None
        what the model had of its own
    """

    def __init__(self, pruning: Pruning, earlier: Callable[..., Any] | None) -> None:
        self.pruning, self.earlier = pruning, earlier

    @property
    def stock(self) -> Callable[..., Any]:
        """What the model had: mostly its class's method."""
        model = self.pruning.model
        found: Callable[..., Any] = self.earlier or type(model).generate.__get__(model)
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "prune" not in kwargs:
            return self.run(args, kwargs)
        with self.pruning.using(kwargs.pop("prune")):
            return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By the method in force."""
        return self.stock(*args, **kwargs)
