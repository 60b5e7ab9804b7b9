"""Pictures as LLaVA's commands send them to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.mm_utils import process_images
from torch import Tensor


def send(
    pictures: Sequence[Any], processor: Any, model: Any, dtype: torch.dtype
) -> Tensor | list[Tensor]:
    """PIL pictures by LLaVA's `process_images`, on the model's device: (B, 3, H, W).

    On LLaVA-NeXT (B, tiles, 3, H, W), or a list where numbers of tiles differ.
    """
    pixels = process_images(list(pictures), processor, model.config)
    if isinstance(pixels, list):
        return [picture.to(model.device, dtype) for picture in pixels]
    sent: Tensor = pixels.to(model.device, dtype)
    return sent
