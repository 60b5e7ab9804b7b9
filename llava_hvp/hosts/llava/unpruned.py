"""Counting the images that stock, unpruned LLaVA encodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_arch import LlavaMetaForCausalLM
from torch import Tensor

from llava_hvp.pruning.monkeypatch import MonkeyPatcher

OnImages = Callable[[Any, int, int], None]


def count_images(patches: MonkeyPatcher, on_images: OnImages) -> None:
    """From now on tell of the images of every call of every unpruned LLaVA model.

    Parameters
    ----------
    on_images : OnImages
        called with the model, the images of a call and their visual tokens together
    """
    name = "prepare_inputs_labels_for_multimodal"
    patches.replace(
        LlavaMetaForCausalLM, name, _counting(getattr(LlavaMetaForCausalLM, name), on_images)
    )


def _counting(stock: Callable[..., Any], on_images: OnImages) -> Callable[..., Any]:
    @functools.wraps(stock)
    def prepare(
        self: Any,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        # Before the encoder is at work: a look at the ids would wait for it.
        text = 0 if images is None else _text_tokens(input_ids, attention_mask)
        found = stock(
            self,
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            labels,
            images,
            image_sizes,
        )
        embeds, mask = found[4], found[2]
        # No embeddings: a call without images, or a step of decoding. Who prunes counts alone.
        if embeds is not None and "llava_hvp" not in vars(self):
            sent = embeds.shape[0] * embeds.shape[1] if mask is None else int(mask.sum())
            on_images(self, len(images), max(0, sent - text))
        return found

    return prepare


def _text_tokens(input_ids: Tensor, mask: Tensor | None) -> int:
    is_text = input_ids != IMAGE_TOKEN_INDEX
    return int((is_text if mask is None else is_text & mask.bool()).sum())
