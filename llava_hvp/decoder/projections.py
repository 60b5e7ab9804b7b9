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
    layers : Sequence[int]
        those whose queries and keys are wanted
    """

    def __init__(self, decoder: Any, layers: Sequence[int]) -> None:
        self._decoder, self._layers = decoder, tuple(layers)
        self._modules: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def sit(self) -> None:
        """Hook the modules that are there now: quantised loading and adapters replace them."""
        attentions = {layer: self._decoder.layers[layer].self_attn for layer in self._layers}
        wanted = [
            (side, layer, getattr(attention, f"{side}_proj"))
            for layer, attention in attentions.items()
            for side in "qk"
        ]
        with _CHANGING:
            same = len(wanted) == len(self._modules) and all(
                module is held for (_, _, module), held in zip(wanted, self._modules, strict=True)
            )
            if same:
                return
            self.remove()
            self._modules = [module for _, _, module in wanted]
            self._handles = [
                module.register_forward_hook(functools.partial(self._caught, side, layer))
                for side, layer, module in wanted
            ]

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
