"""Opening a checkpoint, of LLaVA's own form or of transformers'."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path

from llava_hvp.checkpoints.checkpoint import Checkpoint
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.form import fetch_config, is_transformers
from llava_hvp.checkpoints.hf import open_hf
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.hosts.llava import compat


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
    """
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OptionError(f"--model-path {path}: no such folder")
    name = get_model_name_from_path(path)
    fetch_config(path)
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu and bits is None else torch.float16)
    if is_transformers(path):
        return open_hf(
            path,
            name,
            device,
            base=base,
            bits=bits,
            dtype=dtype,
            conv_mode=conv_mode,
            device_map=device_map,
        )
    if base is not None and "lora" in name.lower() and importlib.util.find_spec("peft") is None:
        raise OptionError(
            "peft is missing, which LoRA checkpoints need: pip install 'llava-hvp[lora]'"
        )
    conv_mode = conv_mode or default_template(name)
    if conv_mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise OptionError(f"--conv-mode {conv_mode}: LLaVA knows {known}")
    tokenizer, model, processor = _load(path, base, name, bits, device, device_map)
    if bits is None and dtype != torch.float16:
        tower = model.get_vision_tower()
        before = tower.dtype
        model.to(dtype)
        tower.to(torch.float32 if before == torch.float32 else dtype)
    return Checkpoint(name, tokenizer, model.eval(), processor, dtype, conv_mode)


def _load(
    path: str, base: str | None, name: str, bits: int | None, device: str, device_map: str | None
) -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor; raises OptionError."""
    compat.bridge()
    from llava.model.builder import load_pretrained_model  # after the bridge

    try:
        tokenizer, model, processor, _ = load_pretrained_model(
            path,
            base,
            name,
            bits == 8,
            bits == 4,
            device_map=device_map or ("auto" if device == "cuda" else device),
            # For any word but "cuda" LLaVA's loader forgets the device_map.
            device="cuda" if torch.device(device).type == "cuda" else device,
        )
    except LlavaHvpError:
        raise
    except Exception as error:  # a hub, a file format, a shape: it cannot be loaded
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"--model-path {path}: LLaVA cannot load it: {reason}") from error
    if not hasattr(model, "get_vision_tower"):
        raise OptionError(
            f"--model-path {path}: loaded as a language model without pictures, as LLaVA does "
            "for names without `llava` in them: rename the checkpoint's folder"
        )
    return tokenizer, model, processor
