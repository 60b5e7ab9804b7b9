"""What is measured: a model of a published shape with random weights, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_hvp.bench.geometry import Geometry, get_geometry
from llava_hvp.bench.workload import random_prompt
from llava_hvp.errors import OptionError

QUESTION = "What is in the picture?"


@dataclass
class Subject:
    """A loaded, unpruned LLaVA on its device.

    about : the model in words
    prompt : (L,) int64 with one image token
    tokenizer, clip_text : where prompt-aware methods cannot load them from the checkpoint
    """

    name: str
    about: str
    model: Any
    dtype: torch.dtype
    geometry: Geometry
    prompt: Tensor
    tokenizer: Any = None
    clip_text: Any = None


def of_geometry(
    name: str,
    device: str,
    dtype: torch.dtype,
    *,
    tower_dtype: torch.dtype | None,
    bits: int | None,
    text_tokens: int,
    seed: int,
) -> Subject:
    """Random weights."""
    from llava_hvp.host.synthetic import build_model, build_text
    from llava_hvp.testing.tokenizers import LLAMA_VOCAB_SIZE

    geometry = get_geometry(name)
    torch.manual_seed(seed)
    model = build_model(geometry, device, dtype, tower_dtype=tower_dtype, bits=bits)
    generator = torch.Generator().manual_seed(seed)
    prompt = random_prompt(text_tokens, LLAMA_VOCAB_SIZE, generator)
    words = f"{name} with random weights, {_dtypes(model, dtype, bits)}"
    return Subject(name, words, model, dtype, geometry, prompt, *build_text(geometry, device))


def of_checkpoint(
    path: str,
    base: str | None,
    device: str,
    dtype: torch.dtype,
    *,
    bits: int | None,
    conv_mode: str | None,
    question: str,
) -> Subject:
    """By LLaVA's own loader, with its conversation template around the question.

    Raises OptionError for a folder that is not there or a template that LLaVA does not know.
    """
    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    from llava_hvp.host.synthetic import geometry_of

    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OptionError(f"--model-path {path}: no such folder")
    name = get_model_name_from_path(path)
    mode = conv_mode or ("mistral_instruct" if "mistral" in name.lower() else "vicuna_v1")
    if mode not in conv_templates:
        raise OptionError(f"--conv-mode {mode}: LLaVA knows {', '.join(sorted(conv_templates))}")
    where = {} if device == "cuda" else {"device": device, "device_map": device}
    tokenizer, model, *_ = load_pretrained_model(path, base, name, bits == 8, bits == 4, **where)
    if bits is None:
        # LLaVA loads float16; a tower that it left in float32 stays so.
        model.to(dtype) if dtype == torch.float32 else model.model.layers.to(dtype)
    conversation = conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question}")
    conversation.append_message(conversation.roles[1], None)
    prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")
    tiles = 5 if getattr(model.config, "image_aspect_ratio", "") == "anyres" else 1
    words = f"{name}, {_dtypes(model, dtype, bits)}"
    return Subject(
        name, words, model, dtype, geometry_of(model, name, tiles), prompt, tokenizer=tokenizer
    )


def _dtypes(model: Any, dtype: torch.dtype, bits: int | None) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    weights = short(dtype) if bits is None else f"{bits} bit, {short(dtype)} activations"
    return f"{weights}, vision tower {short(model.get_vision_tower().dtype)}"
