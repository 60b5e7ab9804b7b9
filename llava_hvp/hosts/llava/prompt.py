"""The prompt in a conversation's token ids: the last user turn, bare."""

from __future__ import annotations

import functools
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

from llava_hvp.pruning.turns import Marks, read_pieces

IMAGE_MARKS = (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IM_END_TOKEN,
    "<Image>",
    "</Image>",
)


@functools.cache
def templates() -> tuple[Marks, ...]:
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
    return tuple(Marks(*each) for each in sorted(found))


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
    return read_pieces(pieces, tokenizer, templates(), IMAGE_MARKS)


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
