"""A checkpoint opened as LLaVA's commands do, and a question in its conversation template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from torch import Tensor

from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.host import compat
from llava_hvp.host.pictures import send


@dataclass(frozen=True)
class Opened:
    """dtype : of the images, as LLaVA's commands send them"""

    name: str
    tokenizer: Any
    model: Any
    processor: Any
    dtype: torch.dtype

    def images(self, pictures: Sequence[Any]) -> Tensor | list[Tensor]:
        """PIL pictures on the model's device, as `host.pictures.send` gives them."""
        return send(pictures, self.processor, self.model, self.dtype)

    def prompt(self, question: str, mode: str | None = None) -> Tensor:
        """(L,) token ids of a question about one image, on the model's device.

        mode : conversation template; by default vicuna_v1, for Mistral mistral_instruct. Raises
            OptionError for one that LLaVA does not know.
        """
        mode = mode or ("mistral_instruct" if "mistral" in self.name.lower() else "vicuna_v1")
        if mode not in conv_templates:
            known = ", ".join(sorted(conv_templates))
            raise OptionError(f"--conv-mode {mode}: LLaVA knows {known}")
        conversation = conv_templates[mode].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        ids: Tensor = tokenizer_image_token(
            conversation.get_prompt(), self.tokenizer, return_tensors="pt"
        )
        return ids.to(self.model.device)


def open_checkpoint(
    path: str,
    device: str,
    *,
    base: str | None = None,
    bits: int | None = None,
    dtype: torch.dtype | None = None,
) -> Opened:
    """By LLaVA's own loader, bridged to this transformers.

    Parameters
    ----------
    path, base : as LLaVA's commands take them
    bits : 4 or 8 to quantise
    dtype : of the language model; float16 as LLaVA loads it, on a CPU float32. A tower that LLaVA
        leaves in float32 stays so.

    Raises
    ------
    OptionError : what cannot be loaded, or is not a LLaVA
    """
    compat.bridge()
    from llava.model.builder import load_pretrained_model  # after the bridge

    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OptionError(f"--model-path {path}: no such folder")
    name = get_model_name_from_path(path)
    where = {} if device == "cuda" else {"device": device, "device_map": device}
    try:
        tokenizer, model, processor, _ = load_pretrained_model(
            path, base, name, bits == 8, bits == 4, **where
        )
    except LlavaHvpError:
        raise
    except Exception as error:  # a hub, a file format, a shape: it cannot be loaded
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"--model-path {path}: LLaVA cannot load it: {reason}") from error
    if not hasattr(model, "get_vision_tower"):
        raise OptionError(
            f"--model-path {path}: loaded as a language model without pictures, as LLaVA does "
            "for names without `llava` in them: rename the checkpoint's folder"
        )
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu and bits is None else torch.float16)
    if bits is None and dtype != torch.float16:
        tower = model.get_vision_tower()
        before = tower.dtype
        model.to(dtype)
        tower.to(torch.float32 if before == torch.float32 else dtype)
    return Opened(name, tokenizer, model, processor, dtype)
