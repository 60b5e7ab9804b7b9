"""What a method that reads the prompt is given of it: CLIP's text encoder, words, embeddings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_hvp.encoder.text import ClipText, cosine_relevance
from llava_hvp.methods.mmtok import content_words
from llava_hvp.pruning.host import HostModel
from llava_hvp.pruning.vision_inputs import OfFeatures

_LOADING = threading.Lock()  # a text encoder, which takes long


class ReadsPrompts:
    """The part of a `Pruning` that reads prompts; loads what it needs when it is first used."""

    host_model: HostModel
    tokenizer: Any
    clip_text: str | Path | ClipText | None

    def load_text(self) -> None:
        """Load what a prompt-aware method reads the prompt with; raises TextEncoderError."""
        encoder = self.host_model.encoder
        needs = encoder.plan().needs
        if needs.relevance is None and not needs.words:
            return
        with _LOADING:
            if self.tokenizer is None:
                self.tokenizer = self.host_model.load_tokenizer()
            if needs.relevance == "clip" and not isinstance(self.clip_text, ClipText):
                clip = ClipText.load(str(self.clip_text or self.host_model.clip_checkpoint))
                clip.check(encoder.vit)
                self.clip_text = clip

    def relevance(self, tiles: tuple[int, ...], rows: list[Tensor] | None) -> OfFeatures | None:
        """The function of patch features that a prompt-aware method needs; None for others.

        Parameters
        ----------
        tiles : tuple[int, ...]
            tiles of each image
        rows : list[Tensor] | None
            token ids of each row of the batch, without padding
        """
        encoder = self.host_model.encoder
        text = encoder.plan().needs.relevance
        if text is None or rows is None:
            return None
        self.load_text()
        prompts = self.host_model.prompts(rows, len(tiles), self.tokenizer)
        repeats = torch.tensor(tiles)

        def of_features(features: Tensor) -> Tensor:
            # An encoder may be there that another method of this model has read with.
            if text == "clip" and isinstance(self.clip_text, ClipText):
                clip = self.clip_text.to(features.device)
                patches = clip.patches(encoder.vit, features)
                texts = torch.stack([clip.embed(prompt) for prompt in prompts])
            else:
                patches = self.host_model.project(features)
                texts = torch.stack([each.float().mean(0) for each in self._embedded(prompts)])
            texts = texts.to(patches.device)
            return cosine_relevance(patches, texts.repeat_interleave(repeats.to(texts.device), 0))

        return of_features

    @torch.no_grad()
    def _words(self, images: int, rows: list[Tensor] | None) -> tuple[Tensor, ...] | None:
        """(M, D) of each image: the input embeddings of its prompt's words; None without prompts.

        Each word is tokenised by itself, as text that is split into words.
        """
        if rows is None:
            return None
        self.load_text()
        prompts = self.host_model.prompts(rows, images, self.tokenizer)
        words = [content_words(prompt).split() or prompt.split() for prompt in prompts]
        return self._embedded(words)

    def _embedded(self, texts: Sequence[str | list[str]]) -> tuple[Tensor, ...]:
        """(tokens, D) input embeddings of each text, one string or words that stand alone.

        In one look-up: where the ranks share the table, each look-up is one of all of them.
        """
        parts = [[text] if isinstance(text, str) else text for text in texts]
        ids = [[i for part in words for i in self._ids(part)] for words in parts]
        flat = torch.tensor([i for each in ids for i in each], dtype=torch.long)
        return self.host_model.embed(flat).split([len(each) for each in ids])

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, no special ones added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
