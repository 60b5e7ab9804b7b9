"""A checkpoint of LLaVA's own classes, opened by LLaVA's own loader."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from torch import Tensor, nn

from llava_hvp.checkpoints.checkpoint import Checkpoint
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.encoder.vit import read_geometry
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.hosts.llava import compat
from llava_hvp.hosts.llava.host import tiled
from llava_hvp.hosts.llava.pictures import send
from llava_hvp.hosts.llava.tiling import TilingConfig
from llava_hvp.hosts.llava.tower import check_tower
from llava_hvp.hosts.llava.view import LlavaView
from llava_hvp.methods.uniform import Uniform
from llava_hvp.show.frame import View


class LlavaCheckpoint(Checkpoint):
    """A loaded model of LLaVA's own classes; `processor` is its vision tower's."""

    host = "llava"

    @property
    def vit(self) -> nn.Module:
        """The vision transformer."""
        model: nn.Module = self.model.get_vision_tower().vision_tower
        return model

    @property
    def stock_tower(self) -> nn.Module:
        """What encodes images where nothing prunes."""
        tower: nn.Module = self.model.get_vision_tower()
        return tower

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        decoder: nn.Module = self.model.get_model()
        return decoder

    @property
    def select_layer(self) -> int:
        """The layer that goes on, as an index into the hidden states."""
        return int(self.model.get_vision_tower().select_layer)

    @property
    def tower(self) -> tuple[torch.device, torch.dtype]:
        """Where the tower runs, and in which dtype."""
        tower = self.model.get_vision_tower()
        return tower.device, tower.dtype

    @property
    def cuts_tiles(self) -> bool:
        """Whether it cuts pictures into AnyRes tiles."""
        return getattr(self.model.config, "image_aspect_ratio", None) == "anyres"

    def view(self, tiling: str = "stock") -> View:
        """How the model sees pictures; raises UnsupportedModelError for a tower of another kind.

        Parameters
        ----------
        tiling : str
            of a Runtime
        """
        tower = self.model.get_vision_tower()
        check_tower(tower, Uniform())
        patches = read_geometry(tower.vision_tower).grid
        with tiled(self.model, tiling):
            own = TilingConfig.of(self.model.config, patches, tower.config.image_size)
        return LlavaView.of(tower, own)

    def images(
        self, pictures: Sequence[Any], variant: Variant | None = None
    ) -> Tensor | list[Tensor]:
        """PIL pictures on the model's device, as `host.pictures.send` gives them.

        Parameters
        ----------
        variant : Variant | None
            for which they are cut, where the model is not pruned by it yet
        """
        with tiled(self.model, (variant or Variant()).runtime.tiling):
            return send(pictures, self.processor, self.model, self.dtype)

    def text(self, question: str, images: int = 1) -> str:
        """The question in the conversation template, after its pictures unless it places them."""
        if images and DEFAULT_IMAGE_TOKEN not in question:
            question = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + question
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    def prompt(self, question: str, images: int = 1) -> Tensor:
        """(L,) token ids of `text`, on the model's device."""
        text = self.text(question, images)
        ids: Tensor = tokenizer_image_token(text, self.tokenizer, return_tensors="pt")
        return ids.to(self.model.device)

    def generate(
        self,
        ids: Tensor,
        images: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) token ids of answers, by LLaVA's own `generate`; see `Checkpoint`."""
        answers: Tensor = self.model.generate(
            ids, images=images, image_sizes=image_sizes, **generation
        )
        return answers

    def generate_of(self) -> Callable[..., Any]:
        """`generate` as a function of the model."""
        found: Callable[..., Any] = type(self.model).generate
        return found

    def prepare(self, ids: Tensor, images: Any, image_sizes: Any) -> dict[str, Any]:
        """From prompts and images to what the language model gets."""
        _, positions, mask, _, embeds, _ = self.model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, images, image_sizes
        )
        return {"position_ids": positions, "attention_mask": mask, "inputs_embeds": embeds}


def open_llava(
    path: str,
    device: str,
    *,
    base: str | None,
    bits: int | None,
    dtype: torch.dtype,
    conv_mode: str | None,
    device_map: str | None,
) -> LlavaCheckpoint:
    """A checkpoint by LLaVA's own loader, bridged to this transformers; see `open_checkpoint`."""
    name = get_model_name_from_path(path)
    if base is not None and "lora" in name.lower() and importlib.util.find_spec("peft") is None:
        raise OptionError(
            "peft is missing, which LoRA checkpoints need: pip install 'llava-hvp[lora]'"
        )
    conv_mode = conv_mode or default_template(name)
    if conv_mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise OptionError(f"--conv-mode {conv_mode}: LLaVA knows {known}")
    tokenizer, model, processor = _load(path, base, name, bits, device, device_map)
    if bits is None and dtype != torch.float16:
        tower = model.get_vision_tower()
        before = tower.dtype
        model.to(dtype)
        tower.to(torch.float32 if before == torch.float32 else dtype)
    return LlavaCheckpoint(name, tokenizer, model.eval(), processor, dtype, conv_mode)


def _load(
    path: str, base: str | None, name: str, bits: int | None, device: str, device_map: str | None
) -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor; raises OptionError."""
    compat.bridge()
    from llava.model.builder import load_pretrained_model  # after the bridge

    try:
        tokenizer, model, processor, _ = load_pretrained_model(
            path,
            base,
            name,
            bits == 8,
            bits == 4,
            device_map=device_map or ("auto" if device == "cuda" else device),
            # For any word but "cuda" LLaVA's loader forgets the device_map.
            device="cuda" if torch.device(device).type == "cuda" else device,
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
    return tokenizer, model, processor
