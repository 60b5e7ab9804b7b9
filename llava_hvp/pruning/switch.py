"""Which pruning is in force: a model's own, or that of a block, thread by thread."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from llava_hvp.encoder.digest import check_same_tower
from llava_hvp.errors import PrunedStateError
from llava_hvp.methods.base import VisionMethod
from llava_hvp.runtime import PruningConfig, Runtime


class Switch:
    """The pruning of one model: its own, but inside a block that has another.

    A block counts for the thread, or asynchronous task, that entered it; others have the model's
    own. Blocks nest.
    """

    def __init__(self, own: PruningConfig) -> None:
        self.own = own

    @property
    def now(self) -> PruningConfig:
        """What is in force here."""
        blocks = reversed(_BLOCKS.get())
        return next((block.config for block in blocks if block.switch() is self), self.own)

    @contextmanager
    def using(self, config: PruningConfig) -> Iterator[None]:
        """Inside the block this is in force."""
        block = _Block(weakref.ref(self), config)
        _BLOCKS.set((*_BLOCKS.get(), block))
        try:
            yield
        finally:
            blocks = _BLOCKS.get()
            if not any(each is block for each in blocks):
                raise PrunedStateError(
                    f"a block that prunes by {config} ends in another thread or task than it began "
                    "in, as a generator of a web page does, and what ran there was pruned by "
                    f"{self.now}: give each call its own, as model.generate(..., prune=method)"
                )
            _BLOCKS.set(tuple(each for each in blocks if each is not block))


class Switched:
    """A vision tower whose pruning a switch decides."""

    prune_switch: Switch

    @property
    def prune_method(self) -> VisionMethod:
        """The method in force here, in this thread."""
        return self.prune_switch.now.method

    @property
    def prune_runtime(self) -> Runtime:
        """How it is run."""
        return self.prune_switch.now.runtime

    @property
    def vit(self) -> Any:
        """The vision transformer, as it is now: loading may replace it."""
        raise NotImplementedError

    def check_tower(self, config: PruningConfig) -> None:
        """Raise UnsupportedModelError where options were tuned for another tower than this."""
        if config.tower is not None:
            check_same_tower(self.vit, config.tower)


class _Block(NamedTuple):
    switch: weakref.ref[Switch]
    config: PruningConfig


_BLOCKS: ContextVar[tuple[_Block, ...]] = ContextVar("llava_hvp_blocks", default=())
