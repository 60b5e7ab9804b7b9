"""A checkpoint that answers prompts in batches, pruned or not, on whatever device there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model

from llava_hvp.errors import OptionError, PrunedStateError
from llava_hvp.host import compat
from llava_hvp.host.measure import Call, measured
from llava_hvp.host.pictures import send
from llava_hvp.host.pruning import attach
from llava_hvp.methods.base import Method

if TYPE_CHECKING:
    from PIL.Image import Image


class Checkpoint:
    """A loaded LLaVA.

    Parameters
    ----------
    path, base : as LLaVA's commands take them
    method : None for unpruned LLaVA
    device : of the model; images and prompts are brought there
    device_map : instead of the one device, as "auto" to spread a model over GPUs
    dtype : of the language model, the projector and the tower; None as LLaVA loads them (float16)
    conv_mode : LLaVA's conversation template
    quantised : load_4bit or load_8bit for LLaVA's loader

    Raises LlavaHvpError where the method cannot prune this checkpoint.
    """

    def __init__(
        self,
        path: str,
        base: str | None = None,
        *,
        method: Method | None,
        device: torch.device,
        conv_mode: str,
        device_map: str | None = None,
        dtype: torch.dtype | None = None,
        quantised: str | None = None,
    ) -> None:
        if conv_mode not in conv_templates:
            raise OptionError(
                f"unknown conversation template {conv_mode!r}: one of {', '.join(conv_templates)}"
            )
        self.conv_mode, self.device = conv_mode, device
        compat.bridge()
        self.tokenizer, model, self.processor, self.max_length = load_pretrained_model(
            path,
            base,
            get_model_name_from_path(path),
            device_map=device_map or str(device),
            device=str(device),
            **({quantised: True} if quantised else {}),
        )
        self.model = (model if dtype is None else model.to(dtype)).eval()
        # Answers begin where prompts end, so rows of a batch are filled up on their left.
        self.model.config.tokenizer_padding_side = "left"
        if method is None and "llava_hvp" in vars(model):
            raise PrunedStateError(
                "the model was loaded pruned, as LLAVA_HVP asks, where unpruned LLaVA was wanted: "
                "unset LLAVA_HVP, or name its method here"
            )
        if method is not None:
            attach(self.model, method, tokenizer=self.tokenizer)

    def answer(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Image]],
        on_call: Callable[[Call], None],
        **generation: Any,
    ) -> list[str]:
        """Answers to a batch of questions with their pictures.

        generation : for `generate`
        """
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
        ids = [
            tokenizer_image_token(
                self.prompt(question, len(own)),
                self.tokenizer,
                IMAGE_TOKEN_INDEX,
                return_tensors="pt",
            )
            for question, own in zip(questions, images, strict=True)
        ]
        flat = [image.convert("RGB") for own in images for image in own]
        pixels = send(flat, self.processor, self.model, self.model.dtype) if flat else None
        inputs, mask = self._pad(ids)
        generate = measured(type(self.model).generate, on_call)
        with torch.inference_mode():
            output = generate(
                self.model,
                inputs,
                images=pixels,
                image_sizes=[image.size for image in flat] if flat else None,
                # One row alone is as in LLaVA's own scripts, which pass none.
                attention_mask=mask if len(ids) > 1 else None,
                pad_token_id=self._pad_id,
                **generation,
            )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def prompt(self, question: str, images: int) -> str:
        """The question in the conversation template, after its pictures unless it places them."""
        if images and DEFAULT_IMAGE_TOKEN not in question:
            question = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + question
        talk = conv_templates[self.conv_mode].copy()
        talk.append_message(talk.roles[0], question)
        talk.append_message(talk.roles[1], None)
        return str(talk.get_prompt())

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _pad(self, ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) ids filled up on the left, and where they are prompt."""
        width = max(len(row) for row in ids)
        inputs = torch.full((len(ids), width), self._pad_id)
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for line, row in enumerate(ids):
            inputs[line, width - len(row) :] = row
            mask[line, width - len(row) :] = True
        return inputs.to(self.device), mask.to(self.device)
