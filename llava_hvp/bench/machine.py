"""Where and with what something was measured, in words."""

from __future__ import annotations

import os
import platform
import shlex
import sys

import torch

from llava_hvp.version import __version__, installed

MATTERS = ("torch", "transformers", "llava-torch", "bitsandbytes")


def about(device: torch.device, model: str) -> dict[str, str]:
    """command, machine, versions, and `model` as it is given."""
    return {
        "command": shlex.join(["llava-hvp", *sys.argv[1:]]),
        "machine": machine(device),
        "versions": versions(),
        "model": model,
    }


def machine(device: torch.device) -> str:
    """The processor or the GPU; no name of the host."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    waiting = os.environ.get("OMP_WAIT_POLICY", "unset")
    return (
        f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, "
        f"{torch.get_num_threads()} torch threads, OMP_WAIT_POLICY={waiting}"
    )


def versions() -> str:
    """Versions of all that matters, as far as it is installed, in words."""
    found = {"llava-hvp": __version__, "Python": platform.python_version(), **installed(*MATTERS)}
    return ", ".join(f"{name} {number}" for name, number in found.items())
