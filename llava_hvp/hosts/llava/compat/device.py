"""Running commands that insist on CUDA on the CPU: LLaVA's eval scripts call `.cuda()`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llava_hvp.pruning.monkeypatch import MonkeyPatcher


def bridge_to_cpu(patches: MonkeyPatcher) -> None:
    """From now on tensors and modules that are sent to CUDA go to the CPU.

    For a process that has no CUDA, or from which it is hidden: nothing that lies on a GPU is moved.
    """
    for kind in (torch.Tensor, torch.nn.Module):
        patches.replace(kind, "cuda", _to_cpu)
        patches.replace(kind, "to", _redirected(kind.to))


def _to_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.to("cpu")


def _redirected(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _instead_of(kwargs["device"])
        return stock(self, *(_instead_of(x) for x in args), **kwargs)

    return to


def _instead_of(device: Any) -> Any:
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    is_cuda = isinstance(device, str) and device.split(":")[0] == "cuda"
    return "cpu" if is_cuda else device
