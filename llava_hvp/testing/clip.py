"""A tiny, complete CLIP checkpoint: vision tower, text encoder, image processor, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llava_hvp.testing.tokenizers import CLIP_MAX_LENGTH, write_clip_tokenizer
from llava_hvp.testing.weights import (
    Weights,
    check_multiple,
    check_positive,
    generator,
    linear,
    new_folder,
    norm,
    randn,
    save_weights,
    write_json,
)

# Received attention then varies between patches by more than half its mean, in all of 24 layers.
DEFAULT_SHARPNESS = 2.0
_TEXT_LAYERS = 2


def make_clip(
    folder: str | Path,
    *,
    layers: int = 24,
    hidden_size: int = 64,
    heads: int = 4,
    image_size: int = 336,
    patch_size: int = 14,
    text: bool = True,
    sharpness: float = DEFAULT_SHARPNESS,
    seed: int = 0,
) -> Path:
    """Write a tiny CLIP checkpoint with its image processor and tokenizer; return its folder.

    Parameters
    ----------
    layers, hidden_size, heads, image_size, patch_size
        Shape of the vision tower. The text encoder has its width and two layers.
    text
        False leaves out the text encoder, both projections and the tokenizer: the checkpoint is
        then a ``CLIPVisionModel``, else a ``CLIPModel``. The tower's weights are the same.
    sharpness
        About the standard deviation of the attention logits of one query. At 0 all patches receive
        the same attention.
    seed
        Equal arguments give equal files; torch's global generator is not used.

    Raises
    ------
    ValueError
        If the sizes do not divide, or ``sharpness`` is negative.
    """
    check_positive(layers=layers, hidden_size=hidden_size, heads=heads, patch_size=patch_size)
    check_multiple("hidden_size", hidden_size, "heads", heads)
    check_multiple("image_size", image_size, "patch_size", patch_size)
    if sharpness < 0:
        raise ValueError(f"sharpness is {sharpness}; it is a standard deviation, 0 or more")
    folder = new_folder(folder)
    vision_config = {
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden_size,
        "image_size": image_size,
        "intermediate_size": 2 * hidden_size,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": patch_size,
        "projection_dim": hidden_size,
    }
    weights = vision_weights(vision_config, generator(seed, "vision"), sharpness)
    config: dict[str, Any] = {"torch_dtype": "float32"}
    if text:
        text_config = _text_config(vision_config, vocab_size=write_clip_tokenizer(folder))
        weights |= _text_weights(text_config, generator(seed, "text"), sharpness)
        config |= {
            "architectures": ["CLIPModel"],
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": hidden_size,
            "text_config": text_config,
            "vision_config": vision_config,
        }
    else:
        config |= {"architectures": ["CLIPVisionModel"], **vision_config}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _image_processor_config(image_size))
    save_weights(folder, weights)
    return folder


def read_vision_config(vision_tower: Path) -> dict[str, Any]:
    """The vision part of the config of any CLIP checkpoint, whole or vision only."""
    path = vision_tower / "config.json"
    if not path.is_file():
        raise ValueError(f"vision_tower is {str(vision_tower)!r}; it holds no CLIP config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vision_config: dict[str, Any] = config.get("vision_config", config)
    return vision_config


def vision_weights(config: dict[str, Any], random: torch.Generator, sharpness: float) -> Weights:
    width, patch, name = config["hidden_size"], config["patch_size"], "vision_model"
    patches = (config["image_size"] // patch) ** 2
    embeddings = f"{name}.embeddings"
    # Pixels are normalised to about unit variance, but neighbours are alike: the sum over a patch
    # grows with its area rather than with the root of it.
    pixels = randn(random, width, 3, patch, patch) / patch
    return {
        f"{embeddings}.class_embedding": randn(random, width),
        f"{embeddings}.patch_embedding.weight": pixels,
        f"{embeddings}.position_embedding.weight": randn(random, patches + 1, width),
        **norm(f"{name}.pre_layrnorm", width, random),
        **_clip_layers(name, config, random, sharpness),
        **norm(f"{name}.post_layernorm", width, random),
    }


def _text_config(vision_config: dict[str, Any], *, vocab_size: int) -> dict[str, Any]:
    shared = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "projection_dim")
    return {key: vision_config[key] for key in (*shared, "num_attention_heads")} | {
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
        "max_position_embeddings": CLIP_MAX_LENGTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "vocab_size": vocab_size,
    }


def _text_weights(config: dict[str, Any], random: torch.Generator, sharpness: float) -> Weights:
    width, name = config["hidden_size"], "text_model"
    embeddings, length = f"{name}.embeddings", config["max_position_embeddings"]
    projection = width, config["projection_dim"]
    return {
        f"{embeddings}.token_embedding.weight": randn(random, config["vocab_size"], width),
        f"{embeddings}.position_embedding.weight": randn(random, length, width),
        **_clip_layers(name, config, random, sharpness),
        **norm(f"{name}.final_layer_norm", width, random),
        **linear("text_projection", *projection, random, bias=False),
        **linear("visual_projection", *projection, random, bias=False),
        "logit_scale": torch.tensor(2.6592),
    }


def _clip_layers(
    name: str, config: dict[str, Any], random: torch.Generator, sharpness: float
) -> Weights:
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers = config["num_hidden_layers"]
    # A logit is a product of a query and a key, so each takes the root. The branches shrink with
    # depth: their sum then stays near the size of the embeddings, with room to spare in float16.
    attention_gain, branch_gain = sharpness**0.5, layers**-0.5
    weights: Weights = {}
    for index in range(layers):
        layer = f"{name}.encoder.layers.{index}"
        weights |= norm(f"{layer}.layer_norm1", width, random)
        for part, gain in (
            ("q", attention_gain),
            ("k", attention_gain),
            ("v", 1.0),
            ("out", branch_gain),
        ):
            weights |= linear(f"{layer}.self_attn.{part}_proj", width, width, random, gain=gain)
        weights |= norm(f"{layer}.layer_norm2", width, random)
        weights |= linear(f"{layer}.mlp.fc1", width, inner, random)
        weights |= linear(f"{layer}.mlp.fc2", inner, width, random, gain=branch_gain)
    return weights


def _image_processor_config(image_size: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }
