"""Random weights by seed, and the writing and checking that the makers share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]


def generator(seed: int, part: str) -> torch.Generator:
    # One stream a part: parts of one seed share no numbers, and none shifts another's.
    return torch.Generator().manual_seed(zlib.crc32(f"{part} {seed}".encode()))


def randn(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=random)


def linear(
    name: str,
    fan_in: int,
    fan_out: int,
    random: torch.Generator,
    *,
    gain: float = 1.0,
    bias: bool = True,
) -> Weights:
    """Weights that give unit variance times ``gain`` from inputs of unit variance."""
    weights = {f"{name}.weight": randn(random, fan_out, fan_in) * gain / fan_in**0.5}
    if bias:
        weights[f"{name}.bias"] = randn(random, fan_out) * gain / 4
    return weights


def norm(name: str, width: int, random: torch.Generator) -> Weights:
    return {
        f"{name}.weight": 1 + randn(random, width) / 8,
        f"{name}.bias": randn(random, width) / 8,
    }


def new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_weights(folder: Path, weights: Weights) -> None:
    # Old transformers refuses a file without this note.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_choice(name: str, value: object, valid: Iterable[object]) -> None:
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, valid))}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more")


def check_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    if size < 1 or size % divisor:
        raise ValueError(f"{name} is {size}; it must be a multiple of {divisor_name} ({divisor})")
