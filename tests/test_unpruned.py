"""What stock LLaVA encodes is counted as pruning counts with every patch kept."""

import pytest
import torch

from llava_hvp import Uniform, prune
from llava_hvp.hosts.llava.unpruned import count_images
from llava_hvp.pruning.monkeypatch import MonkeyPatcher


@pytest.fixture
def counted():
    """The calls that stock models make: (images, tokens) of each."""
    calls, patches = [], MonkeyPatcher()
    count_images(patches, lambda model, images, tokens: calls.append((images, tokens)))
    yield calls
    patches.undo()


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-llama", "llava-next-spatial"])
def test_images_and_tokens_are_those_of_a_budget_that_keeps_all(kind, loaded, photos, counted):
    bundle = loaded(kind)
    sizes = [photo.size for photo in photos[:2]]
    pixels, ids = bundle.pixels(*photos[:2]), bundle.ids("What?", images=2)
    with prune(bundle.model, Uniform(r_max=1)) as pruned:
        bundle.generate(ids, pixels, sizes)
        tokens = sum(report.stock_tokens for report in pruned.last)
    assert counted == []  # who prunes counts alone
    bundle.generate(ids, pixels, sizes)
    assert counted == [(2, tokens)]  # and no step of decoding
    bundle.generate(bundle.ids("What?", images=0), None, None)
    assert len(counted) == 1


def test_a_ragged_batch_with_its_mask(loaded, photos, counted):
    bundle = loaded("llava-1.5-llama")
    rows = [bundle.ids("What?")[0], bundle.ids("What is to be seen in here?")[0]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    sizes = [photo.size for photo in photos[:2]]
    bundle.embeds(ids, bundle.pixels(*photos[:2]), sizes, attention_mask=mask)
    assert counted == [(2, 2 * 64)]
