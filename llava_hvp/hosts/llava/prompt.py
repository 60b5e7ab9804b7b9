"""The prompt in a conversation's token ids: the last user turn, bare."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import SeparatorStyle, conv_templates
from torch import Tensor

from llava_hvp.errors import TextEncoderError

_IMAGE_MARKS = (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IM_END_TOKEN,
    "<Image>",
    "</Image>",
)


@dataclass(frozen=True)
class _Marks:
    """What stands before a user's message, and what stands between it and the answer."""

    user: re.Pattern[str]
    answer: re.Pattern[str]
    ends: tuple[str, ...]


@functools.cache
def _templates() -> tuple[_Marks, ...]:
    """The marks of every conversation that this LLaVA knows."""
    found = set()
    for template in conv_templates.values():
        style, (user, answer) = template.sep_style, template.roles
        ends = tuple(end for end in (template.sep, template.sep2) if end and end.strip())
        if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO):
            found.add((user + ":", answer + ":", ends))
        elif style == SeparatorStyle.MPT:
            found.add((user.strip(), answer.strip(), ends))
        elif style == SeparatorStyle.LLAMA_2:
            found.add(("[INST]", "[/INST]", ends))
    return tuple(_Marks(_pattern(u), _pattern(a), ends) for u, a, ends in sorted(found))


def _pattern(mark: str) -> re.Pattern[str]:
    # Slow tokenizers decode special tokens with a space after them: "<|im_start|> user".
    return re.compile(re.escape(mark).replace(">", r">\s*"))


def last_user_turn(text: str) -> str:
    """The last user message of a conversation in any of LLaVA's templates, without system text,
    role names and image tokens. Text in no template is one message."""
    best = (-1, text)
    for marks in _templates():
        answers = [match.start() for match in marks.answer.finditer(text)]
        if not answers or answers[-1] <= best[0]:
            continue
        # A turn starts at the first user mark after the answer before it; a message that quotes
        # the answer's mark has none there, so look one answer further back.
        for before in [*reversed(answers[:-1]), 0]:
            start = marks.user.search(text, before, answers[-1])
            if start is not None:
                message = text[start.end() : answers[-1]].strip()
                for end in marks.ends:
                    message = message.removesuffix(end).strip()
                best = (answers[-1], message)
                break
    message = re.sub(r"<<SYS>>.*?<</SYS>>", "", best[1], flags=re.DOTALL)
    for mark in _IMAGE_MARKS:
        message = message.replace(mark, " ")
    return message.strip()


def read_prompt(ids: Tensor, tokenizer: Any) -> str:
    """The last user turn of one row of `input_ids`, (tokens,) with padding taken off.

    Raises TextEncoderError where there is no text in it.
    """
    pieces: list[list[int]] = [[]]
    for token in ids.tolist():
        if token == IMAGE_TOKEN_INDEX:
            pieces.append([])
        elif token >= 0:
            pieces[-1].append(token)
    text = " ".join(
        tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for piece in pieces
    )
    prompt = last_user_turn(text)
    for special in tokenizer.all_special_tokens:
        prompt = prompt.replace(special, " ").strip()
    if not prompt:
        raise TextEncoderError(
            "the conversation's last user turn has no text, and this method keeps what the prompt "
            "asks about: ask something, or use one that does not read it, as hiprune"
        )
    return prompt


def rows_of_images(rows: list[Tensor], images: int) -> list[Tensor]:
    """The row that each image stands in; one without an image token holds an image, unused."""
    marks = _image_marks(rows)
    found = [row for row, count in zip(rows, marks, strict=True) for _ in range(max(1, count))]
    return (found + rows[-1:] * images)[:images]


def images_of_rows(rows: list[Tensor], images: int) -> tuple[tuple[int, ...], ...]:
    """The images, numbered, whose tokens stand in each row; one without an image token uses one."""
    found, first = [], 0
    for count in _image_marks(rows):
        found.append(tuple(range(first, min(first + count, images))))
        first += max(1, count)
    return tuple(found)


def _image_marks(rows: list[Tensor]) -> list[int]:
    """Image tokens of each row."""
    marks: list[int] = torch.stack([(row == IMAGE_TOKEN_INDEX).sum() for row in rows]).tolist()
    return marks
