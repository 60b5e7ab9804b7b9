"""What the text encoder learns to match: a caption of each picture, a prompt for each thing.

CLIP's tokenizer is made from the words that these hold.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from llava_hvp.shapes.questions import WORDINGS, article
from llava_hvp.shapes.scenes import COLOURS, NAMES, PLACES, SHAPES
from llava_hvp.testing.tokenizers import CLIP_MAX_LENGTH

PROMPTS = (
    "{a} {what}",
    "{what}",
    "the {what}",
    "a picture of {a} {what}",
    *(w for task in ("existence", "place", "left") for w in WORDINGS[task]),
)
TEXT_PROMPTS = (
    "digits",
    "a number",
    "a picture of digits",
    *WORDINGS["digits"],
)
_WORDS = (*PROMPTS, *TEXT_PROMPTS, *(w for task in WORDINGS.values() for w in task))


def word_list() -> str:
    """Every word that a prompt or a caption holds: the text that CLIP's tokenizer is made from."""
    words = " ".join(_WORDS).replace("{what}s", " ").replace("{what}", " ").replace("{a}", "a an")
    words += " " + " ".join((*COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES), "and the digits"))
    words += " " + " ".join(" ".join(row) for row in PLACES)
    words += " answer the question using a single word or phrase"
    kept = (word.strip("?.,").lower() for word in words.split())
    return " ".join(dict.fromkeys(word for word in kept if word.isalpha()))


def split_words(text: str) -> list[str]:
    """Words, single digits and marks, as CLIP's tokenizer splits them."""
    spaced = "".join(f" {c} " if c in "?.,0123456789" else c for c in text.lower())
    return spaced.split()


class Vocabulary:
    """CLIP's tokenizer in a folder, a word at a time: it never joins words, so they can be kept."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.start, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.words: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L) ids, (B,) index of the end token."""
        rows = [[self.start, *(i for w in split_words(t) for i in self._word(w))] for t in texts]
        rows = [row[: CLIP_MAX_LENGTH - 1] for row in rows]
        ends = torch.tensor([len(row) for row in rows])
        table = torch.full((len(rows), int(ends.max()) + 1), self.end)
        for row, ids in enumerate(rows):
            table[row, : len(ids)] = torch.tensor(ids)
        return table, ends

    def _word(self, word: str) -> list[int]:
        if word not in self.words:
            self.words[word] = self.tokenizer(word).input_ids[1:-1]
        return self.words[word]


def caption(things: list[str], number: str, random: Random) -> str:
    """a red circle, a blue star and the digits 47"""
    parts = [f"{article(name)} {name}" for name in things]
    random.shuffle(parts)
    if number:
        parts.append(f"the digits {number}")
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def class_prompts(random: Random) -> list[str]:
    """25 prompts in one random wording: for each of NAMES, and for digits."""
    wording = random.choice(PROMPTS)
    return [wording.format(a=article(name), what=name) for name in NAMES] + [
        random.choice(TEXT_PROMPTS)
    ]
