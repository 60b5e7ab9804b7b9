"""transformers' own LLaVA on tiny checkpoints, which are LLaVA's converted: the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from PIL import Image

from llava_hvp.checkpoints.convert import to_transformers
from llava_hvp.hosts.hf.versions import OLDEST, release

needs_release = pytest.mark.skipif(
    release() < OLDEST, reason="transformers' own LLaVA classes are pruned from 4.57 on"
)
KINDS = ["llava-1.5-llama", "llava-next-llama", "llava-next-mistral-unfrozen"]
QUESTIONS = ["What is this?", "How many cups are on the table, and of what colour?", "Where?"]


@dataclass
class HFBundle:
    """A model and its processor, in float32 on the CPU."""

    path: Path
    model: Any
    processor: Any

    @property
    def is_next(self) -> bool:
        return "next" in self.path.name

    def inputs(self, texts: Any, pictures: Any, side: str = "left") -> Any:
        """What the processor gives for prompts, each with as many images as marks stand in it."""
        self.processor.tokenizer.padding_side = side
        given: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if pictures:
            given["images"] = pictures
        return self.processor(**given)

    def ask(
        self, *questions: str, pictures: Any = None, side: str = "left", images: int = 1
    ) -> Any:
        """One prompt a question, with a picture each."""
        marks = "<image>\n" * images
        texts = [f"USER: {marks}{question} ASSISTANT:" for question in questions]
        return self.inputs(texts, pictures, side)

    def generate(self, inputs: Any, tokens: int = 6, **kwargs: Any) -> Any:
        """Greedy ids behind the prompt, always `tokens` of them."""
        given = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        ids = self.model.generate(**inputs, **{**given, **kwargs})
        assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        return ids[:, inputs["input_ids"].shape[1] :]

    def logits(self, inputs: Any, **kwargs: Any) -> torch.Tensor:
        """Of a forward pass."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, **kwargs).logits
        return logits

    def own(self) -> HFBundle:
        """A copy that a test may spoil."""
        return HFBundle(self.path, copy.deepcopy(self.model), self.processor)


def convert(source: Path, target: Path) -> Path:
    return target if target.is_dir() else to_transformers(source, target)


def load(path: Path, **kwargs: Any) -> HFBundle:
    """As a user does."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    given = {"dtype": torch.float32, **kwargs}
    model = AutoModelForImageTextToText.from_pretrained(path, **given).eval()
    processor = AutoProcessor.from_pretrained(path)
    # One picture is as large as another for the tests that compare hosts; a batch wants padding.
    processor.tokenizer.pad_token = processor.tokenizer.unk_token
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return HFBundle(path, model, processor)


def sized(photos: list[Image.Image]) -> list[Image.Image]:
    """Pictures that LLaVA-NeXT cuts into different numbers of tiles."""
    return [photos[0], photos[3].resize((100, 300)), photos[1].resize((112, 112))]


def ask(bundle: HFBundle, photos: list[Image.Image], **kwargs: Any) -> Any:
    """A batch of two questions with a picture each; of different tile counts on LLaVA-NeXT."""
    return bundle.ask(*QUESTIONS[:2], pictures=sized(photos)[:2], **kwargs)


def state(model: Any) -> list[Any]:
    """What pruning could leave behind."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def batch(bundle: HFBundle, photos: list[Image.Image], side: str = "left") -> tuple[Any, list[Any]]:
    """Rows with one image, two and none, and each row by itself."""
    pictures = sized(photos)
    texts = [
        f"USER: <image>\n{QUESTIONS[1]} ASSISTANT:",
        f"USER: <image> and <image>\n{QUESTIONS[0]} ASSISTANT:",
        f"USER: {QUESTIONS[2]} ASSISTANT:",
    ]
    held = [pictures[:1], pictures[1:], None]
    rows = [bundle.inputs([t], p, side) for t, p in zip(texts, held, strict=True)]
    return bundle.inputs(texts, pictures, side), rows


def as_llavas(bundle, inputs):
    """Ids with one mark an image, pixels and (width, height) as LLaVA takes them."""
    token, rows = bundle.model.config.image_token_id, []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        first = torch.cat((torch.tensor([False]), ids[1:] == ids[:-1])) & (ids == token)
        rows.append(ids[~first].masked_fill(ids[~first] == token, IMAGE_TOKEN_INDEX))
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, length - len(row) :], mask[n, length - len(row) :] = row, True
    pixels = inputs["pixel_values"]
    if not bundle.is_next:
        return ids, mask, pixels, [(112, 112)] * len(pixels)
    sizes = [(width, height) for height, width in inputs["image_sizes"].tolist()]
    tiles = [int(stack.flatten(1).any(1).sum()) for stack in pixels]
    return ids, mask, [s[:n] for s, n in zip(pixels, tiles, strict=True)], sizes
