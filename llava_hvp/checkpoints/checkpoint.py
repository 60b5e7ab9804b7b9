"""A checkpoint opened as LLaVA's commands do, and questions put to it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from torch import Tensor

from llava_hvp.checkpoints.applied import applied
from llava_hvp.checkpoints.conversation import default_template
from llava_hvp.checkpoints.generate_stats import Call, measured
from llava_hvp.checkpoints.variants import PrunedBy, Variant
from llava_hvp.encoder.text import ClipText
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.hosts.llava import compat, grid
from llava_hvp.hosts.llava.pictures import send

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Checkpoint:
    """A loaded LLaVA, what makes its inputs of pictures and questions, and what prunes it.

    Parameters
    ----------
    name : str
        as LLaVA calls it
    tokenizer, model, processor : Any
        as LLaVA's loader gives them; random weights have no processor
    dtype : torch.dtype
        of the images, as LLaVA's commands send them
    conv_mode : str
        LLaVA's conversation template of every prompt
    clip_text : ClipText | None
        the text encoder of the tower's own checkpoint, once a method has read the prompt with it
    """

    name: str
    tokenizer: Any
    model: Any
    processor: Any
    dtype: torch.dtype
    conv_mode: str
    clip_text: ClipText | None = None

    @contextlib.contextmanager
    def pruned_by(self, by: PrunedBy) -> Iterator[Any]:
        """Prune the model inside the block; gives the `Pruning`, or None where by none."""
        variant = Variant.of(by)
        put_on = applied(
            variant, self.model, self.dtype, tokenizer=self.tokenizer, clip_text=self.clip_text
        )
        with put_on as pruning:
            if pruning is not None:
                self.clip_text = pruning.clip_text
            yield pruning

    def images(
        self, pictures: Sequence[Any], variant: Variant | None = None
    ) -> Tensor | list[Tensor]:
        """PIL pictures on the model's device, as `host.pictures.send` gives them.

        Parameters
        ----------
        variant : Variant | None
            for which they are cut, where the model is not pruned by it yet
        """
        with grid.fixed(self.model, (variant or Variant()).runtime.tiling):
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

    def answer(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Image]],
        on_call: Callable[[Call], None],
        **generation: Any,
    ) -> list[str]:
        """Answers to a batch of questions with their pictures.

        Parameters
        ----------
        generation : Any
            for `generate`
        """
        # Answers begin where prompts end, so rows of a batch are filled up on their left.
        self.model.config.tokenizer_padding_side = "left"
        # A prompt without a picture would use up the next prompt's, so the two go separately.
        groups = [
            [i for i, own in enumerate(images) if bool(own) is wanted] for wanted in (True, False)
        ]
        answers: dict[int, str] = {}
        for group in groups:
            if group:
                texts = self._answer(
                    [questions[i] for i in group], [images[i] for i in group], on_call, generation
                )
                answers |= dict(zip(group, texts, strict=True))
        return [answers[i] for i in range(len(questions))]

    def _answer(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Image]],
        on_call: Callable[[Call], None],
        generation: dict[str, Any],
    ) -> list[str]:
        ids = [self.prompt(text, len(own)) for text, own in zip(questions, images, strict=True)]
        flat = [image.convert("RGB") for own in images for image in own]
        inputs, mask = self._pad(ids)
        generate = measured(type(self.model).generate, on_call)
        with torch.inference_mode():
            output = generate(
                self.model,
                inputs,
                images=self.images(flat) if flat else None,
                image_sizes=[image.size for image in flat] if flat else None,
                # One row alone is as in LLaVA's own scripts, which pass none.
                attention_mask=mask if len(ids) > 1 else None,
                pad_token_id=self._pad_id,
                **generation,
            )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _pad(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, L) ids filled up on the left, and where they are prompt."""
        width, device = max(len(row) for row in ids), self.model.device
        inputs = torch.full((len(ids), width), self._pad_id, device=device)
        mask = torch.zeros(len(ids), width, dtype=torch.bool, device=device)
        for line, row in enumerate(ids):
            inputs[line, width - len(row) :] = row
            mask[line, width - len(row) :] = True
        return inputs, mask


def open_checkpoint(
    path: str,
    device: str,
    *,
    base: str | None = None,
    bits: int | None = None,
    dtype: torch.dtype | None = None,
    conv_mode: str | None = None,
    device_map: str | None = None,
) -> Checkpoint:
    """A checkpoint by LLaVA's own loader, bridged to this transformers.

    Parameters
    ----------
    path, base : str | str | None
        as LLaVA's commands take them
    bits : int | None
        4 or 8 to quantise
    dtype : torch.dtype | None
        of the language model and the images; float16 as LLaVA loads it, on a CPU float32. The tower
        goes along, unless LLaVA's loader leaves it in float32, as it does with a LLaVA-1.5 and
        device_map="auto". What is quantised stays as it is, and takes float16 images.
    conv_mode : str | None
        conversation template; by default `default_template` of `checkpoints.conversation`
    device_map : str | None
        for LLaVA's loader; by default "auto" on "cuda", as LLaVA's commands have it, else the one
        device

    Raises
    ------
    OptionError
        a template that LLaVA does not know; a LoRA checkpoint without peft; what cannot be loaded,
        or is not a LLaVA
    """
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OptionError(f"--model-path {path}: no such folder")
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
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu and bits is None else torch.float16)
    if bits is None and dtype != torch.float16:
        tower = model.get_vision_tower()
        before = tower.dtype
        model.to(dtype)
        tower.to(torch.float32 if before == torch.float32 else dtype)
    return Checkpoint(name, tokenizer, model.eval(), processor, dtype, conv_mode)


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
