"""Opening a checkpoint, of LLaVA's own form or of transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_hvp.checkpoints.checkpoint import Checkpoint
from llava_hvp.checkpoints.form import fetch_config, is_transformers
from llava_hvp.checkpoints.hf import open_hf
from llava_hvp.errors import OptionError


def open_checkpoint(
    path: str,
    device: str,
    *,
    base: str | None = None,
    bits: int | None = None,
    dtype: torch.dtype | None = None,
    conv_mode: str | None = None,
    device_map: str | None = None,
) -> Checkpoint:
    """A checkpoint by LLaVA's own loader, bridged to this transformers, or by transformers' own.

    Parameters
    ----------
    path, base : str | str | None
        as LLaVA's commands take them
    bits : int | None
        4 or 8 to quantise
    dtype : torch.dtype | None
        of the language model and the images; float16 as LLaVA loads it, on a CPU float32. The tower
        goes along, unless LLaVA's loader leaves it in float32, as it does with a LLaVA-1.5 and
        device_map="auto". What is quantised stays as it is, and takes float16 images.
    conv_mode : str | None
        conversation template; by default `default_template` of `checkpoints.conversation`, and of
        transformers' own classes the checkpoint's chat template
    device_map : str | None
        for LLaVA's loader; by default "auto" on "cuda", as LLaVA's commands have it, else the one
        device

    Raises
    ------
    OptionError
        a template that LLaVA does not know; a LoRA checkpoint without peft; what cannot be loaded,
        or is not a LLaVA
    UnsupportedVersionError
        LLaVA's own form without `llava`, or on a release of transformers that is not known
    """
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OptionError(f"--model-path {path}: no such folder")
    fetch_config(path)
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu and bits is None else torch.float16)
    given: dict[str, Any] = {"base": base, "bits": bits, "dtype": dtype}
    given |= {"conv_mode": conv_mode, "device_map": device_map}
    if is_transformers(path):
        return open_hf(path, device, **given)
    from llava_hvp.hosts.llava import compat

    compat.check_versions()  # before LLaVA is imported, which may be missing
    from llava_hvp.checkpoints.llava import open_llava

    return open_llava(path, device, **given)
