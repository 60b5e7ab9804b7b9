"""The gaps between LLaVA and the newer transformers releases, bridged where they are.

`prune` bridges the one model that it is given; `builder.install` bridges loading as well. `bridge`
does both for a stock, unpruned LLaVA, and `unbridge` takes it back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from llava_hvp.hosts.llava.compat.loading import bridge_loading
from llava_hvp.hosts.llava.compat.versions import check_versions, llava_models, transformers_version
from llava_hvp.pruning.monkeypatch import MonkeyPatcher


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


def new_cache(config: Any) -> Any:
    """An empty cache as `generate` makes one; the oldest releases know nothing of a config."""
    from transformers.cache_utils import DynamicCache

    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters
    return DynamicCache(config=config) if takes_config else DynamicCache()


_BRIDGED = MonkeyPatcher()


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
