"""A batch of token ids with fewer placeholders: which column of the long one each column is.

Pure indexing. Where positions close up after it, which of an image's placeholders go does not
matter: the first ones stay. Where they stay as they are, those of the tokens that stay are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError

PADDING = -1


@dataclass(frozen=True)
class Shortened:
    """A shortened batch.

    Parameters
    ----------
    source : Tensor
        (B, L') int64, the column of the long batch that each column is; PADDING for none
    visual : Tensor
        (B, L') bool, the columns that hold visual tokens
    removed : bool
        whether any column went or came
    """

    source: Tensor
    visual: Tensor
    removed: bool

    def take(self, columns: Tensor, padding: int) -> Tensor:
        """(B, L') of (B, L) columns, new padding filled with a value."""
        if not self.removed:
            return columns
        source = self.source.to(columns.device)
        taken = columns.gather(1, source.clamp(min=0))
        return taken.masked_fill(source == PADDING, padding)


def images_of_rows(placeholders: Sequence[int], stock: Sequence[int]) -> list[int]:
    """How many of the images, in their order, each row holds.

    Parameters
    ----------
    placeholders : Sequence[int]
        of each row
    stock : Sequence[int]
        placeholders that each image has

    Raises
    ------
    UnsupportedModelError
        the rows do not hold just these images
    """
    counts, left = [], list(stock)
    for wanted in placeholders:
        count = 0
        while wanted > 0 and left and left[0] <= wanted:
            wanted -= left.pop(0)
            count += 1
        if wanted:
            break
        counts.append(count)
    if left or len(counts) < len(placeholders):
        raise UnsupportedModelError(
            f"image tokens and images do not match: the rows hold {list(placeholders)} "
            f"placeholders, and the images, in order, have {list(stock)}: give what the model's "
            "own processor makes of text and images together, and do not truncate it"
        )
    return counts


def shorten(
    placeholder: Tensor,
    real: Tensor,
    stock: Sequence[int],
    kept: Sequence[int],
    *,
    pad_left: bool,
    which: Sequence[Tensor] | None = None,
) -> Shortened:
    """Give every image as many columns as tokens of it stay; close the rows up and pad them anew.

    Parameters
    ----------
    placeholder : Tensor
        (B, L) bool on the CPU, columns that hold an image's placeholder
    real : Tensor
        (B, L) bool on the CPU, columns that are no padding. Columns inside a row that are not real
        stay where they are
    stock, kept : Sequence[int]
        of each image, in order of the rows: its placeholders, and the tokens that stay; these may
        be more
    pad_left : bool
        where rows that are shorter than the longest get their padding
    which : Sequence[Tensor] | None
        (kept,) int64 of each image, the placeholders that stay; the first ones by default

    Raises
    ------
    UnsupportedModelError
        the placeholders are not those of the images
    """
    counts = images_of_rows(placeholder.sum(1).tolist(), stock)
    if list(stock) == list(kept):
        columns = torch.arange(placeholder.shape[1]).expand(placeholder.shape)
        return Shortened(columns, placeholder, False)
    rows, first = [], 0
    for held, row, inside in zip(counts, placeholder, real, strict=True):
        images = slice(first, first + held)
        chosen = None if which is None else which[images]
        rows.append(_row(row, inside, stock[images], kept[images], chosen))
        first += held
    length = max(len(row) for row in rows)
    source = torch.full((len(rows), length), PADDING)
    for target, row in zip(source, rows, strict=True):
        start = length - len(row) if pad_left else 0
        target[start : start + len(row)] = row
    visual = placeholder.gather(1, source.clamp(min=0)) & (source != PADDING)
    return Shortened(source, visual, True)


def _row(
    placeholder: Tensor,
    real: Tensor,
    stock: Sequence[int],
    kept: Sequence[int],
    which: Sequence[Tensor] | None,
) -> Tensor:
    """(columns,) of one row that stay, in order; a column comes again where tokens are added."""
    times = torch.zeros(len(placeholder), dtype=torch.int64)
    inside = (real | placeholder).nonzero()[:, 0]
    if len(inside):
        times[inside[0] : inside[-1] + 1] = 1
    for image, columns in enumerate(placeholder.nonzero()[:, 0].split(list(stock))):
        if which is not None:
            times[columns] = 0
            times[columns[which[image]]] = 1
            continue
        stays = min(kept[image], len(columns))
        times[columns[stays:]] = 0
        if stays:
            times[columns[stays - 1]] += kept[image] - stays
    return torch.arange(len(placeholder)).repeat_interleave(times)
