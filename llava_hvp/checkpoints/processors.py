"""Tokenizer and image processor of a checkpoint, in LLaVA's form and in transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llava_hvp.files import write_json

IMAGE = "<image>"
SENTENCEPIECE = "tokenizer.model"


def swapped_pinpoints(config: dict[str, Any]) -> list[list[int]]:
    """LLaVA's are (width, height), transformers' (height, width); which comes first can matter."""
    return [[height, width] for width, height in config["image_grid_pinpoints"]]


def write_image_tokenizer(source: Path, target: Path) -> int:
    """Write the tokenizer with one token more, which stands for an image; return its id."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tokenizer.save_pretrained(target)
    if (source / SENTENCEPIECE).is_file():  # for the way back: releases differ in what they save
        shutil.copyfile(source / SENTENCEPIECE, target / SENTENCEPIECE)
    image: int = tokenizer.convert_tokens_to_ids(IMAGE)
    return image


def write_llama_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer without the image's token, in the form that LLaVA's loader opens."""
    shutil.copyfile(source / SENTENCEPIECE, target / SENTENCEPIECE)
    given = json.loads((source / "tokenizer_config.json").read_text())
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    plain = {name: _content(given[name]) for name in kept if given.get(name) is not None}
    fixed = {"add_bos_token": True, "add_eos_token": False, "legacy": True}
    write_json(
        target / "tokenizer_config.json",
        {**plain, **fixed, "padding_side": "right", "tokenizer_class": "LlamaTokenizer"},
    )


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def write_processor(
    target: Path,
    tower: Path,
    config: dict[str, Any],
    vision: dict[str, Any],
    family: str,
    template: str,
) -> None:
    pictures = json.loads((tower / "preprocessor_config.json").read_text())
    pictures |= {"image_processor_type": f"{family}ImageProcessor"}
    pictures |= {"processor_class": f"{family}Processor"}
    if family == "LlavaNext":
        pictures["image_grid_pinpoints"] = swapped_pinpoints(config)
    else:
        pictures["do_pad"] = config.get("image_aspect_ratio") == "pad"
    write_json(target / "preprocessor_config.json", pictures)
    write_json(
        target / "processor_config.json",
        {
            "processor_class": f"{family}Processor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,  # CLS, which the strategy takes off again
            "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": "default",
        },
    )
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def clip_processor(source: Path, side: int) -> dict[str, Any]:
    """A CLIPImageProcessor of the same normalisation."""
    path = source / "preprocessor_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    path = source / "processor_config.json"
    if path.is_file():
        given = json.loads(path.read_text()).get("image_processor") or given
    for name in ("image_grid_pinpoints", "do_pad", "processor_class", "data_format", "device"):
        given.pop(name, None)
    return {
        **given,
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
    }
