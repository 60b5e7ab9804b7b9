"""Tiny, complete LLaVA-1.5 and LLaVA-NeXT checkpoints with random weights.

The files are written straight from tensors and JSON, under the names that the published
checkpoints have, so the bytes do not depend on the version of transformers that is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_hvp.testing.clip import (
    DEFAULT_SHARPNESS,
    make_clip,
    read_vision_config,
    vision_weights,
)
from llava_hvp.testing.tokenizers import (
    LLAMA_FIRST_TEXT_ID,
    LLAMA_VOCAB_SIZE,
    write_llama_tokenizer,
)
from llava_hvp.testing.weights import (
    Weights,
    check_choice,
    check_multiple,
    check_positive,
    generator,
    linear,
    new_folder,
    randn,
    save_weights,
    write_json,
)

# (width, height) in tiles: the grids of the published LLaVA-NeXT checkpoints.
_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
_MERGE_TYPES = {"1.5": "flat", "next": "spatial_unpad"}
_ASPECT_RATIOS = {"1.5": "pad", "next": "anyres"}
_MAX_LENGTHS = {"1.5": 2048, "next": 4096}
_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_checkpoint(
    folder: str | Path,
    *,
    version: str = "1.5",
    language: str = "llama",
    vision_tower: str | Path | None = None,
    unfreeze_mm_vision_tower: bool = False,
    mm_patch_merge_type: str | None = None,
    image_aspect_ratio: str | None = None,
    layers: int = 2,
    hidden_size: int = 64,
    heads: int = 4,
    max_position_embeddings: int = 4096,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Write a tiny LLaVA checkpoint with its tokenizer; return its folder.

    The stock loader goes by the name it is given: it wants ``llava`` in it, and ``mistral`` where
    ``language`` is that. The config holds the tower's absolute path, so do not move the folder.

    Parameters
    ----------
    version
        ``"1.5"`` (one padded tile) or ``"next"`` (1.6: AnyRes tiles).
    language
        ``"llama"`` or ``"mistral"`` (grouped keys and values).
    vision_tower
        Folder of a CLIP checkpoint; None makes one in ``folder/vision_tower``.
    unfreeze_mm_vision_tower
        Put a trained tower into this checkpoint, as the published 1.6 ones do. Its weights differ
        from those in ``vision_tower``, so that one can see which were loaded.
    mm_patch_merge_type, image_aspect_ratio
        None takes what the published checkpoints of this version have: ``"flat"`` and ``"pad"``,
        or ``"spatial_unpad"`` and ``"anyres"``.
    layers, hidden_size, heads, max_position_embeddings
        Shape of the language model.
    dtype
        torch.float16 or torch.float32, of the stored weights.
    seed
        Equal arguments give equal weights; torch's global generator is not used.

    Raises
    ------
    ValueError
        If an argument has none of the values above, or the sizes do not divide.
    """
    check_choice("version", version, _MERGE_TYPES)
    check_choice("language", language, _ARCHITECTURES)
    merge_type = _MERGE_TYPES[version] if mm_patch_merge_type is None else mm_patch_merge_type
    aspect_ratio = _ASPECT_RATIOS[version] if image_aspect_ratio is None else image_aspect_ratio
    check_choice("mm_patch_merge_type", merge_type, ("flat", "spatial", "spatial_unpad"))
    check_choice("image_aspect_ratio", aspect_ratio, ("square", "pad", "anyres"))
    check_choice("dtype", dtype, (torch.float16, torch.float32))
    check_positive(layers=layers, heads=heads, max_position_embeddings=max_position_embeddings)
    if language == "mistral":
        check_multiple("heads", heads, "the queries a key serves", 2)
    # Rotary embeddings turn pairs of a head's numbers.
    check_multiple("hidden_size", hidden_size, "twice the heads", 2 * heads)
    folder = new_folder(folder)
    if vision_tower is None:
        vision_tower = make_clip(folder / "vision_tower", seed=seed)
    vision_tower = Path(vision_tower).resolve()
    vision_config = read_vision_config(vision_tower)

    config = {
        "architectures": [_ARCHITECTURES[language]],
        "model_type": f"llava_{language}",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_language_config(language, layers, hidden_size, heads, max_position_embeddings),
        **_vision_language_config(vision_config["hidden_size"]),
        "image_aspect_ratio": aspect_ratio,
        "mm_patch_merge_type": merge_type,
        "mm_vision_tower": str(vision_tower),
        "tokenizer_model_max_length": _MAX_LENGTHS[version],
        "unfreeze_mm_vision_tower": unfreeze_mm_vision_tower,
    }
    if aspect_ratio == "anyres":
        side = vision_config["image_size"]
        config["image_grid_pinpoints"] = [[w * side, h * side] for w, h in _NEXT_GRIDS]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _SPECIAL_IDS)
    write_llama_tokenizer(folder, model_max_length=_MAX_LENGTHS[version])

    weights = _language_weights(config, generator(seed, "language"))
    if unfreeze_mm_vision_tower:
        random = generator(seed, "unfrozen vision")
        tower = vision_weights(vision_config, random, DEFAULT_SHARPNESS)
        weights |= {f"model.vision_tower.vision_tower.{name}": w for name, w in tower.items()}
    save_weights(folder, {name: weight.to(dtype) for name, weight in weights.items()})
    return folder


def _language_config(
    language: str, layers: int, hidden_size: int, heads: int, max_position_embeddings: int
) -> dict[str, Any]:
    config = {
        **_SPECIAL_IDS,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": LLAMA_VOCAB_SIZE,
    }
    if language == "llama":
        return config | {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None}
    return config | {"num_key_value_heads": heads // 2, "sliding_window": None}


def _vision_language_config(tower_hidden_size: int) -> dict[str, Any]:
    return {
        "freeze_mm_mlp_adapter": False,
        "mm_hidden_size": tower_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def _language_weights(config: dict[str, Any], random: torch.Generator) -> Weights:
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    # Words and image enter at the same scale, and the layers outweigh them: with small random
    # branches the next token would depend on the last one only, and answers would be short loops.
    embedding_gain = 0.5
    gains = {"q": 3.0, "k": 3.0, "v": 2.0, "o": 2.0, "gate": 1.0, "up": 1.0, "down": 1.5}
    weights = {"model.embed_tokens.weight": embedding_gain * randn(random, vocab, width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for part, fan_in, fan_out in (
            ("self_attn.q", width, width),
            ("self_attn.k", width, key_value_width),
            ("self_attn.v", width, key_value_width),
            ("self_attn.o", width, width),
            ("mlp.gate", width, inner),
            ("mlp.up", width, inner),
            ("mlp.down", inner, width),
        ):
            gain = gains[part.split(".")[1]]
            name = f"{layer}.{part}_proj"
            weights |= linear(name, fan_in, fan_out, random, gain=gain, bias=False)
        weights[f"{layer}.input_layernorm.weight"] = torch.ones(width)
        weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(width)
    weights["model.norm.weight"] = torch.ones(width)
    weights |= linear("model.mm_projector.0", config["mm_hidden_size"], width, random)
    weights |= linear("model.mm_projector.2", width, width, random, gain=embedding_gain)
    if "unpad" in config["mm_patch_merge_type"]:
        weights["model.image_newline"] = embedding_gain * randn(random, width)
    weights |= linear("lm_head", width, vocab, random, bias=False)
    # No logit of </s> or of a byte can win: answers have the length asked for and are readable.
    weights["lm_head.weight"][:LLAMA_FIRST_TEXT_ID] = 0
    return weights
