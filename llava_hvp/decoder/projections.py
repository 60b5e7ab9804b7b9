"""Queries and keys of decoder layers, caught as the layers themselves compute them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_hvp.decoder.run import PromptRun, current


class Projections:
    """Hooks on q_proj and k_proj of some layers.

    Parameters
    ----------
    decoder : Any
        with the layers
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._layers: frozenset[int] = frozenset()
        self._modules: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def sit(self, layers: Sequence[int]) -> None:
        """Catch the queries and keys of these layers too, of the modules that are there now.

        Quantised loading and adapters replace them. Layers of earlier calls stay hooked: another
        thread may be running them.
        """
        with _CHANGING:
            self._layers |= set(layers)
            attentions = {n: self._decoder.layers[n].self_attn for n in sorted(self._layers)}
            wanted = [
                (side, layer, getattr(attention, f"{side}_proj"))
                for layer, attention in attentions.items()
                for side in "qk"
            ]
            same = len(wanted) == len(self._modules) and all(
                module is held for (_, _, module), held in zip(wanted, self._modules, strict=True)
            )
            if same:
                return
            before = self._handles
            self._modules = [module for _, _, module in wanted]
            self._handles = [
                module.register_forward_hook(functools.partial(self._caught, side, layer))
                for side, layer, module in wanted
            ]
            for handle in before:  # last, so that there is no moment without
                handle.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._modules, self._handles = [], []

    def _caught(self, side: str, layer: int, module: Any, args: tuple, output: Tensor) -> None:
        run = current(self._decoder)
        if isinstance(run, PromptRun) and run.reading == layer:
            run.projected[side] = output


_CHANGING = threading.Lock()
