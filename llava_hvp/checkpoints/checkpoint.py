"""A checkpoint opened as its framework does, and questions put to it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llava_hvp.checkpoints.applied import applied
from llava_hvp.checkpoints.generate_stats import Call, measured
from llava_hvp.checkpoints.variants import PrunedBy, Variant
from llava_hvp.encoder.text import ClipText
from llava_hvp.show.frame import View

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Checkpoint(ABC):
    """A loaded LLaVA, what makes its inputs of pictures and questions, and what prunes it.

    Parameters
    ----------
    name : str
        as LLaVA calls it
    tokenizer, model, processor : Any
        as the host's own loader gives them
    dtype : torch.dtype
        of the images
    conv_mode : str
        LLaVA's conversation template of every prompt; empty for the checkpoint's own
    clip_text : ClipText | None
        the text encoder of the tower's own checkpoint, once a method has read the prompt with it
    """

    host: ClassVar[str]  # whose classes the model is of, in words

    name: str
    tokenizer: Any
    model: Any
    processor: Any
    dtype: torch.dtype
    conv_mode: str
    clip_text: ClipText | None = None
    _named_clips: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @contextlib.contextmanager
    def pruned_by(self, by: PrunedBy) -> Iterator[Any]:
        """Prune the model inside the block; gives the `Pruning`, or None where by none."""
        variant = Variant.of(by)
        named = None if variant.pruning is None else variant.pruning.clip_text
        clip = self.clip_text if named is None else self._named_clips.get(named, named)
        with applied(variant, self.model, self.dtype, tokenizer=self.reader, clip_text=clip) as on:
            if on is not None and named is not None:
                self._named_clips[named] = on.clip_text
            elif on is not None:
                self.clip_text = on.clip_text
            yield on

    @property
    def reader(self) -> Any:
        """What a method reads the prompt with."""
        return self.tokenizer

    @property
    @abstractmethod
    def vit(self) -> nn.Module:
        """The vision transformer."""

    @property
    @abstractmethod
    def stock_tower(self) -> nn.Module:
        """What encodes images where nothing prunes."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The language model without its head."""

    @property
    def head(self) -> nn.Module:
        """What makes logits of the decoder's states."""
        head: nn.Module = self.model.lm_head
        return head

    @property
    @abstractmethod
    def select_layer(self) -> int:
        """The layer that goes on, as an index into the hidden states."""

    @property
    @abstractmethod
    def tower(self) -> tuple[torch.device, torch.dtype]:
        """Where the tower runs, and in which dtype."""

    @property
    @abstractmethod
    def cuts_tiles(self) -> bool:
        """Whether it cuts pictures into AnyRes tiles."""

    @abstractmethod
    def view(self, tiling: str = "stock") -> View:
        """How the model sees pictures; raises a LlavaHvpError where it cannot be drawn so.

        Parameters
        ----------
        tiling : str
            of a Runtime
        """

    @abstractmethod
    def images(
        self, pictures: Sequence[Any], variant: Variant | None = None
    ) -> Tensor | list[Tensor]:
        """PIL pictures on the model's device, as its `generate` takes them.

        Parameters
        ----------
        variant : Variant | None
            for which they are cut, where the model is not pruned by it yet
        """

    @abstractmethod
    def text(self, question: str, images: int = 1) -> str:
        """The question as it is asked, after its pictures unless it places them."""

    @abstractmethod
    def prompt(self, question: str, images: int = 1) -> Tensor:
        """(L,) token ids of `text`, a mark for each image, on the model's device."""

    @abstractmethod
    def generate(
        self,
        ids: Tensor,
        images: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) token ids of answers, by the host's own `generate`.

        Parameters
        ----------
        ids : Tensor
            (B, L) prompts, as `prompt` gives them
        images : Any
            as `images` gives them; None for none
        image_sizes : Sequence[tuple[int, int]] | None
            (width, height) of each
        """

    @abstractmethod
    def generate_of(self) -> Callable[..., Any]:
        """`generate` as a function of the model."""

    @abstractmethod
    def prepare(self, ids: Tensor, images: Any, image_sizes: Any) -> dict[str, Any]:
        """From prompts and images to what the language model gets."""

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
        generate = measured(self.generate_of(), on_call)
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
