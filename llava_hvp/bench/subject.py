"""What is measured: a model of a published shape with random weights, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.bench.workload import random_prompt
from llava_hvp.checkpoints.geometry import Geometry, get_geometry
from llava_hvp.checkpoints.naming import model_name

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
    from llava_hvp.checkpoints.synthetic import build_model, build_text
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

    Raises OptionError for what cannot be loaded, or a template that LLaVA does not know.
    """
    from llava_hvp.checkpoints.checkpoint import open_checkpoint
    from llava_hvp.checkpoints.synthetic import geometry_of

    opened = open_checkpoint(path, device, base=base, bits=bits, dtype=dtype, conv_mode=conv_mode)
    name, model, prompt = model_name(path), opened.model, opened.prompt(question)
    tiles = 5 if getattr(model.config, "image_aspect_ratio", "") == "anyres" else 1
    words = f"{name}, {_dtypes(model, dtype, bits)}"
    return Subject(
        name,
        words,
        model,
        dtype,
        geometry_of(model, name, tiles),
        prompt,
        tokenizer=opened.tokenizer,
    )


def _dtypes(model: Any, dtype: torch.dtype, bits: int | None) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    weights = short(dtype) if bits is None else f"{bits} bit, {short(dtype)} activations"
    return f"{weights}, vision tower {short(model.get_vision_tower().dtype)}"
