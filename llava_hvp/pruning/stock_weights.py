"""A vision tower that runs in another dtype than it was loaded in can be given back as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StockWeights:
    """A vision transformer's weights in the dtype that they were loaded in, on the CPU.

    While they wait, `state_dict` gives them, so that `save_pretrained` writes what it would of a
    stock tower. A weight that was changed meanwhile counts as it is, in its old dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: p.data.to("cpu") for name, p in model.named_parameters()}
        self._hook = model._register_state_dict_hook(self._into)

    def put_back(self, model: nn.Module) -> None:
        """Give the model its weights back as they were."""
        self._hook.remove()
        for name, parameter in model.named_parameters():
            parameter.data = self._stock(name, parameter.data).to(parameter.device)

    def _stock(self, name: str, now: Tensor) -> Tensor:
        weight = self._weights[name]
        unchanged = torch.equal(weight.to(now.dtype), now.cpu())
        return weight if unchanged else now.to(weight.dtype)

    def _into(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self._weights:
            now = state.get(prefix + name)
            # A Parameter is asked for by keep_vars, as the one in use.
            if now is not None and not isinstance(now, nn.Parameter):
                state[prefix + name] = self._stock(name, now)
