"""Shortened batches of ids, against a loop over lists: random rows, either side, more or fewer."""

import random

import pytest
import torch

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.sequence import images_of_rows, shorten

IMAGE, PAD = 9, 0


def slow(rows, stock, kept, length, pad_left):
    """Rows of (id, real) with the first tokens of each image, or its last again; padded."""
    images, short = list(zip(stock, kept, strict=True)), []
    for row in rows:
        first = next((n for n, (_, real) in enumerate(row) if real), len(row))
        last = max((n for n, (_, real) in enumerate(row) if real), default=-1)
        closed, seen = [], 0
        for token, real in row[first : last + 1]:
            if token != IMAGE:
                closed.append((token, real))
                continue
            seen += 1
            if seen <= images[0][1]:
                closed.append((token, real))
            if seen == images[0][0]:
                closed += [(token, real)] * (images[0][1] - images[0][0])
                images.pop(0)
                seen = 0
        padding = [(PAD, False)] * (length - len(closed))
        short.append(padding + closed if pad_left else closed + padding)
    assert not images
    return short


def random_row(draw):
    """A row of text and images, some of which follow each other, and what its images have."""
    row, stock = [], []
    for _ in range(draw.randint(0, 3)):
        row += [(draw.randint(1, 8), draw.random() > 0.1) for _ in range(draw.randint(0, 3))]
        stock.append(draw.randint(1, 5))
        row += [(IMAGE, True)] * stock[-1]
    return [(5, True), *row, (7, True)], stock


@pytest.mark.parametrize("pad_left", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_shortened_rows_equal_the_slow_ones(seed, pad_left):
    draw = random.Random(seed)
    made = [random_row(draw) for _ in range(draw.randint(1, 4))]
    length = max(len(row) for row, _ in made)
    rows = [
        [(PAD, False)] * (length - len(row)) + row
        if pad_left
        else row + [(PAD, False)] * (length - len(row))
        for row, _ in made
    ]
    stock = [count for _, counts in made for count in counts]
    kept = [draw.randint(0, count + 2) for count in stock]
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    real = torch.tensor([[told for _, told in row] for row in rows])
    shortened = shorten(ids == IMAGE, real, stock, kept, pad_left=pad_left)
    found, mask = shortened.take(ids, PAD), shortened.take(real.long(), 0)
    if stock == kept:
        assert torch.equal(found, ids)
        assert not shortened.removed
        return
    expected = slow(rows, stock, kept, found.shape[1], pad_left)
    assert found.tolist() == [[token for token, _ in row] for row in expected]
    assert mask.tolist() == [[int(told) for _, told in row] for row in expected]
    assert torch.equal(shortened.visual, found == IMAGE)
    assert any(told for row in expected for told in (row[0][1], row[-1][1]))


@pytest.mark.parametrize(
    ("placeholders", "stock"), [([5], [4]), ([3], [4]), ([4, 4], [8]), ([4], [4, 4]), ([4, 4], [4])]
)
def test_counts_that_do_not_match_are_refused(placeholders, stock):
    with pytest.raises(UnsupportedModelError, match="do not match"):
        images_of_rows(placeholders, stock)


def test_images_are_told_by_their_counts():
    assert images_of_rows([7, 0, 5], [3, 4, 5]) == [2, 0, 1]
