"""What is measured: a model of a published shape with random weights, or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_hvp.bench.workload import random_prompt
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.geometry import LlavaGeometry, get_geometry, shapes_of
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from llava_hvp.checkpoints.checkpoint import Checkpoint

HOSTS = ("llava", "transformers")
QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Subject:
    """A loaded, unpruned LLaVA on its device, and what it is asked.

    Parameters
    ----------
    name : str
        as files are named after it
    about : str
        the model in words
    prompt : Tensor
        (L,) int64 with one image token
    """

    name: str
    about: str
    checkpoint: Checkpoint
    geometry: LlavaGeometry
    prompt: Tensor


def of_geometry(
    name: str,
    hosts: Sequence[str],
    device: str,
    dtype: torch.dtype,
    *,
    tower_dtype: torch.dtype | None,
    bits: int | None,
    text_tokens: int,
    seed: int,
) -> list[Subject]:
    """Random weights with a text encoder of their own, for each host; of two the same weights.

    Parameters
    ----------
    hosts : Sequence[str]
        of HOSTS
    tower_dtype : torch.dtype | None
        of LLaVA's own classes; transformers' have the tower in `dtype`
    """
    from llava_hvp.checkpoints.synthetic import build_text
    from llava_hvp.testing.tokenizers import LLAMA_VOCAB_SIZE

    geometry = get_geometry(name)
    torch.manual_seed(seed)
    llavas = _llavas(geometry, device, dtype, tower_dtype, bits) if "llava" in hosts else None
    opened = [] if llavas is None else [llavas]
    if "transformers" in hosts:
        model = None if llavas is None else llavas.model
        opened.append(_transformers(geometry, device, dtype, bits, model))
    opened.sort(key=lambda checkpoint: hosts.index(checkpoint.host))
    tokenizer, clip_text = build_text(geometry, device)
    generator = torch.Generator().manual_seed(seed)
    prompt = random_prompt(text_tokens, LLAMA_VOCAB_SIZE, generator)
    for checkpoint in opened:
        checkpoint.tokenizer, checkpoint.clip_text = tokenizer, clip_text
    return [
        Subject(
            name,
            f"{name} with random weights, {_dtypes(checkpoint.tower[1], dtype, bits)}",
            checkpoint,
            geometry,
            prompt,
        )
        for checkpoint in opened
    ]


def about_all(subjects: Sequence[Subject]) -> str:
    """The model in words, and where hosts have it otherwise, that of each."""
    words = list(dict.fromkeys(what.about for what in subjects))
    if len(words) == 1:
        return words[0]
    return "; ".join(f"{what.checkpoint.host}: {what.about}" for what in subjects)


def _llavas(
    geometry: LlavaGeometry,
    device: str,
    dtype: torch.dtype,
    tower_dtype: torch.dtype | None,
    bits: int | None,
) -> Checkpoint:
    from llava_hvp.hosts.llava import compat

    compat.bridge()  # unpruned LLaVA runs on no newer transformers without
    from llava_hvp.checkpoints.llava import LlavaCheckpoint
    from llava_hvp.checkpoints.synthetic import build_model

    model = build_model(geometry, device, dtype, tower_dtype=tower_dtype, bits=bits)
    processor = model.get_vision_tower().image_processor
    template = default_template(geometry.name)
    return LlavaCheckpoint(geometry.name, None, model, processor, dtype, template)


def _transformers(
    geometry: LlavaGeometry, device: str, dtype: torch.dtype, bits: int | None, llavas: Any
) -> Checkpoint:
    from llava_hvp.checkpoints.hf import HFCheckpoint
    from llava_hvp.checkpoints.synthetic_hf import build_hf_model, build_processor

    model = build_hf_model(geometry, device, dtype, bits=bits, llavas=llavas)
    return HFCheckpoint(geometry.name, None, model, build_processor(geometry), dtype, "")


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
    """By its framework's own loader, with its conversation template around the question.

    Raises OptionError for what cannot be loaded, or a template that LLaVA does not know.
    """
    from llava_hvp.checkpoints.opening import open_checkpoint

    opened = open_checkpoint(path, device, base=base, bits=bits, dtype=dtype, conv_mode=conv_mode)
    name, model = model_name(path), opened.model
    tiles = 5 if opened.cuts_tiles else 1
    geometry = shapes_of(opened.vit, opened.select_layer, model, name, tiles)
    words = f"{name}, {_dtypes(opened.tower[1], dtype, bits)}"
    return Subject(name, words, opened, geometry, opened.prompt(question))


def _dtypes(tower: torch.dtype, dtype: torch.dtype, bits: int | None) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    weights = short(dtype) if bits is None else f"{bits} bit, {short(dtype)} activations"
    return f"{weights}, vision tower {short(tower)}"
