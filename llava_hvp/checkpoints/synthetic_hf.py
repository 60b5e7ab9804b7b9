"""Models of transformers' own LLaVA classes in a published shape, with random weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_hvp.checkpoints.chat_templates import TEMPLATES
from llava_hvp.checkpoints.geometry import LlavaGeometry
from llava_hvp.checkpoints.processors import write_image_tokenizer, write_processor
from llava_hvp.checkpoints.synthetic import (
    NEXT_GRIDS,
    add_layers,
    clip_config,
    clip_image_processor,
    language_arguments,
    made,
    module_of,
    one_layer,
    quantise,
)
from llava_hvp.testing.tokenizers import LLAMA_VOCAB_SIZE, write_llama_tokenizer

# The first id that the tokenizer, which is smaller than the model's vocabulary, leaves free.
IMAGE_TOKEN = LLAMA_VOCAB_SIZE


def build_hf_model(
    geometry: LlavaGeometry,
    device: str,
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    llavas: Any = None,
) -> Any:
    """A `LlavaForConditionalGeneration`, or `LlavaNext…`, in eval mode.

    Parameters
    ----------
    dtype : torch.dtype
        of all of it, the vision tower included, as `from_pretrained` loads it
    bits : int | None
        4 or 8 quantises, the tower as well
    llavas : Any
        a model of LLaVA's own classes in this shape, by `build_model`: this one has its modules,
        so that both have the same weights and there is one copy of them
    """
    config = _config(geometry)
    family = module_of(f"{_family(geometry)}ForConditionalGeneration")
    if llavas is not None:
        with made("meta", dtype):
            model = family(config)
        _share(model, llavas, dtype, bits)
    elif bits is None:
        with made(device, dtype):
            model = family(config)
    else:
        with made(device, dtype):
            with one_layer(config.text_config):
                model = family(config)
            quantise(model, bits)
            add_layers(model.model.language_model.layers, config.text_config, bits)
    model.model.vision_tower.requires_grad_(False)
    return model.eval()


def build_processor(geometry: LlavaGeometry) -> Any:
    """The processor of such a model, with a small tokenizer."""
    from transformers import AutoProcessor

    vision = geometry.vision
    config = {"image_aspect_ratio": "pad", "image_grid_pinpoints": _pinpoints(geometry)}
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        write_llama_tokenizer(source, model_max_length=4096)
        clip_image_processor(vision.image).save_pretrained(source)
        write_image_tokenizer(source, target)
        write_processor(
            target,
            source,
            config,
            {"patch_size": vision.patch},
            _family(geometry),
            TEMPLATES["vicuna_v1"],
        )
        return AutoProcessor.from_pretrained(target)


def _family(geometry: LlavaGeometry) -> str:
    return "LlavaNext" if geometry.is_next else "Llava"


def _pinpoints(geometry: LlavaGeometry) -> list[list[int]]:
    """(width, height) in pixels, as LLaVA's configs have them."""
    side = geometry.vision.image
    return [[width * side, height * side] for width, height in NEXT_GRIDS]


def _config(geometry: LlavaGeometry) -> Any:
    vision, language = geometry.vision, geometry.language
    text = module_of("MistralConfig" if language.is_mistral else "LlamaConfig")
    pinpoints = [[height, width] for width, height in _pinpoints(geometry)]
    return module_of(f"{_family(geometry)}Config")(
        vision_config=clip_config(vision),
        text_config=text(**language_arguments(language)),
        image_token_index=IMAGE_TOKEN,
        projector_hidden_act="gelu",
        vision_feature_layer=vision.select - vision.layers - 1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **({"image_grid_pinpoints": pinpoints} if geometry.is_next else {}),
    )


def _share(model: Any, llavas: Any, dtype: torch.dtype, bits: int | None) -> None:
    """Give a model without weights the modules of one of LLaVA's own classes."""
    inner, lender = model.model, llavas.get_model()
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        setattr(inner.language_model, name, getattr(lender, name))
    model.lm_head = llavas.lm_head
    inner.multi_modal_projector.linear_1 = lender.mm_projector[0]
    inner.multi_modal_projector.linear_2 = lender.mm_projector[2]
    if hasattr(inner, "image_newline"):
        inner.image_newline = lender.image_newline
    inner.vision_tower = _tower(llavas.get_vision_tower().vision_tower, dtype, bits)
    waiting = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not waiting, f"not shared: {waiting}"


def _tower(lent: nn.Module, dtype: torch.dtype, bits: int | None) -> nn.Module:
    """LLaVA's, or where LLaVA has it in another precision a copy."""
    is_quantised = not all(p.is_floating_point() for p in lent.parameters())
    if is_quantised or (bits is None and all(p.dtype == dtype for p in lent.parameters())):
        return lent
    tower = copy.deepcopy(lent).to(dtype)
    if bits is not None:
        quantise(tower, bits)
    return tower
