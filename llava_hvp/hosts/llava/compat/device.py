"""Running commands that insist on CUDA on the CPU: LLaVA's eval scripts call `.cuda()`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
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
    patches.replace(torch.cuda, "synchronize", lambda device=None: None)


def bridge_deepspeed_to_cpu(*, trains: bool) -> None:
    """For a rank on the CPU, as a launcher started it: ranks speak by gloo alone.

    DeepSpeed would compile kernels of its own for a minute, and one that is killed meanwhile leaves
    a lock for which all later ones wait.

    Parameters
    ----------
    trains : bool
        begin with the ranks now: transformers' trainer would partition the weights of one rank only
    """
    if "WORLD_SIZE" not in os.environ or importlib.util.find_spec("deepspeed") is None:
        return
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if trains:
        deepspeed.init_distributed("gloo")


def without_flash_attention(train: Callable[..., Any]) -> Callable[..., Any]:
    """LLaVA's `train` for a CPU, which has none: torch's own instead."""

    @functools.wraps(train)
    def run(attn_implementation: str | None = None) -> Any:
        is_flash = (attn_implementation or "").startswith("flash_attention")
        return train(attn_implementation="sdpa" if is_flash else attn_implementation)

    return run


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
