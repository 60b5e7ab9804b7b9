"""LLaVA models of a published shape with random weights, made straight on their device.

Of LLaVA's own classes (`synthetic_hf` has transformers'), for measurements that need no weights: no
weight is ever in host memory unless the model is to be there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_hvp.checkpoints.geometry import Language, LlavaGeometry, Vision, shapes_of
from llava_hvp.encoder.text import ClipText
from llava_hvp.testing.tokenizers import write_clip_tokenizer, write_llama_tokenizer

# (width, height) in tiles: what the published LLaVA-NeXT checkpoints choose from.
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SCALE = 0.02  # standard deviation of the weights that are drawn


def build_model(
    geometry: LlavaGeometry,
    device: str,
    dtype: torch.dtype,
    *,
    tower_dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Any:
    """A LLaVA model, its vision tower loaded, in eval mode.

    Parameters
    ----------
    dtype : torch.dtype
        of the language model and the projector
    tower_dtype : torch.dtype | None
        of the vision tower; by default as LLaVA's scripts leave it: float32 for 1.5, whose tower is
        loaded from its own checkpoint, and `dtype` for NeXT, which brings it along
    bits : int | None
        4 or 8 quantises as `--load-4bit` and `--load-8bit` do
    """
    if tower_dtype is None:
        tower_dtype = dtype if geometry.is_next else torch.float32
    vision = clip_config(geometry.vision)
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        # LLaVA reads the tower's shape from a folder while the model is built.
        Path(folder, "config.json").write_text(json.dumps(vision.to_dict(), default=str))
        config, kind = _llava_config(geometry, folder)
        with made(device, dtype):
            model = kind(config) if bits is None else _quantised(kind, config, bits)
    tower = model.get_vision_tower()
    with made(device, tower_dtype):
        tower.vision_tower = module_of("CLIPVisionModel")(vision).requires_grad_(False)
        if bits is not None and geometry.is_next:  # the tower comes within the checkpoint
            quantise(tower.vision_tower, bits)
    tower.image_processor = clip_image_processor(geometry.vision.image)
    tower.is_loaded = True
    newline = getattr(model.get_model(), "image_newline", None)
    if newline is not None:
        newline.data.normal_(std=SCALE)
    return model.eval()


def build_text(geometry: LlavaGeometry, device: str) -> tuple[Any, ClipText]:
    """The tokenizer and the CLIP text encoder that prompt-aware methods read the prompt with."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTokenizer

    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        write_llama_tokenizer(Path(folder), model_max_length=4096)
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        write_clip_tokenizer(Path(folder))
        clip_tokenizer = CLIPTokenizer.from_pretrained(folder)
    # The text side of CLIP-L; a tiny tower gets a tiny one.
    wide = 768 if geometry.vision.hidden == 1024 else geometry.vision.hidden
    config = CLIPTextConfig(
        hidden_size=wide,
        intermediate_size=4 * wide,
        num_hidden_layers=geometry.vision.layers // 2,
        num_attention_heads=wide // 64,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        projection_dim=wide,
    )
    with made(device, torch.float32):
        encoder = module_of("CLIPTextModel")(config).eval()
        text, patches = nn.Linear(wide, wide, bias=False), nn.Linear(geometry.vision.hidden, wide)
    length = config.max_position_embeddings
    return tokenizer, ClipText(
        clip_tokenizer, getattr(encoder, "text_model", encoder), text, patches, length
    )


def geometry_of(model: Any, name: str, tiles: int) -> LlavaGeometry:
    """The shapes of a loaded model, for one whose weights are real.

    Parameters
    ----------
    tiles : int
        that the encoder sees of one image
    """
    tower = model.get_vision_tower()
    return shapes_of(tower.vision_tower, tower.select_layer, model, name, tiles)


def quantise(model: nn.Module, bits: int) -> None:
    """Replace the Linear modules by quantised ones of random weights, one at a time.

    As bitsandbytes under LLaVA's `--load-4bit` and `--load-8bit`; the logits stay as they are.
    """
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        weight = module.weight
        shape = (module.in_features, module.out_features, module.bias is not None)
        new: nn.Module
        if bits == 4:
            new = bnb.nn.Linear4bit(
                *shape, compute_dtype=torch.float16, quant_type="nf4", device="meta"
            )
            new.weight = bnb.nn.Params4bit(
                weight.data, requires_grad=False, quant_type="nf4", module=new
            )
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
        if module.bias is not None:
            new.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(weight.device))


def _quantised(kind: type, config: Any, bits: int) -> Any:
    """A model whose layers never are in full precision all at once."""
    with one_layer(config):
        model = kind(config)
    quantise(model, bits)
    add_layers(model.get_model().layers, config, bits)
    return model


@contextlib.contextmanager
def one_layer(config: Any) -> Iterator[None]:
    """What is made of a language model's config in the block has one layer; see `add_layers`."""
    total, config.num_hidden_layers = config.num_hidden_layers, 1
    try:
        yield
    finally:
        config.num_hidden_layers = total


def add_layers(layers: nn.ModuleList, config: Any, bits: int) -> None:
    """Append to the first layer what the config has behind it, quantised one at a time."""
    for index in range(1, config.num_hidden_layers):
        layer = type(layers[0])(config, index)
        quantise(layer, bits)
        layers.append(layer)


@contextlib.contextmanager
def made(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Tensors that are made in the block are made there, and of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def clip_config(vision: Vision) -> Any:
    """transformers' config of a CLIP vision tower."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=vision.hidden,
        intermediate_size=vision.mlp,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image,
        patch_size=vision.patch,
    )


def language_arguments(language: Language) -> dict[str, Any]:
    """What a config of a language model is made with."""
    return {
        "hidden_size": language.hidden,
        "intermediate_size": language.mlp,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "vocab_size": language.vocab,
        "max_position_embeddings": 4096,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if language.is_mistral else {}),
    }


def _llava_config(geometry: LlavaGeometry, tower: str) -> tuple[Any, type]:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import (
        LlavaMistralConfig,
        LlavaMistralForCausalLM,
    )

    side = geometry.vision.image
    kinds = (
        (LlavaMistralConfig, LlavaMistralForCausalLM)
        if geometry.language.is_mistral
        else (LlavaConfig, LlavaLlamaForCausalLM)
    )
    config = kinds[0](**language_arguments(geometry.language))
    llava = {
        "mm_hidden_size": geometry.vision.hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": geometry.vision.select - geometry.vision.layers - 1,
        "mm_vision_tower": tower,
        "image_aspect_ratio": "anyres" if geometry.is_next else "pad",
        "mm_patch_merge_type": "spatial_unpad" if geometry.is_next else "flat",
        "image_grid_pinpoints": [[w * side, h * side] for w, h in NEXT_GRIDS],
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
    for name, value in llava.items():
        setattr(config, name, value)
    return config, kinds[1]


def clip_image_processor(side: int) -> Any:
    """As CLIP's own checkpoints have it."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def module_of(name: str) -> Any:
    """A class of transformers, whatever its constructor is said to take."""
    import transformers

    return getattr(transformers, name)
