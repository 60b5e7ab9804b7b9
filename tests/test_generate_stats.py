"""Measuring `generate`: what it says, and that it changes nothing."""

import pytest
import torch

from llava_hvp import HIVTP, prune
from llava_hvp.checkpoints.generate_stats import measure_all, measured
from llava_hvp.pruning.monkeypatch import MonkeyPatcher


def generate(bundle, photo, calls=None, tokens=5, **kwargs):
    """Ids of an answer, by the measured generate where calls are wanted."""
    ids, pixels = bundle.ids("What is this?"), bundle.pixels(photo)
    run = type(bundle.model).generate
    run = run if calls is None else measured(run, calls.append)
    return run(
        bundle.model,
        ids,
        images=pixels,
        image_sizes=[photo.size],
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        **kwargs,
    )


@pytest.mark.parametrize("name", ["llava-1.5-llama", "llava-next-mistral-unfrozen"])
def test_unpruned_it_counts_what_stock_sends_and_changes_nothing(loaded, photos, name):
    bundle, calls = loaded(name), []
    assert torch.equal(generate(bundle, photos[0], calls), generate(bundle, photos[0]))
    (call,) = calls
    assert 0 < call.first_token < call.seconds
    assert (call.tokens, call.prompts, call.images) == (5, 1, 1)
    embeds, *_ = bundle.embeds(
        bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    )
    assert call.kept_tokens == embeds.shape[1] - (bundle.ids("What is this?").shape[1] - 1)
    assert call.stock_tokens == call.kept_tokens
    assert (call.kept_of_stock, call.kept_of_patches) == (1, 1)


def test_pruned_it_has_the_numbers_of_the_reports(own, photos):
    bundle, calls = own("llava-next-llama"), []
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        plain = generate(bundle, photos[0])
        assert torch.equal(generate(bundle, photos[0], calls), plain)
        (report,) = pruned.last
    call = calls[0]
    assert (call.kept_tokens, call.stock_tokens) == (report.kept_tokens, report.stock_tokens)
    assert call.kept_of_stock == pytest.approx(report.kept_of_stock)
    assert call.kept_of_patches == pytest.approx(report.kept_of_patches)


def test_beams_a_prompt_without_a_picture_and_the_users_own_processors(loaded, photos):
    bundle, calls = loaded("llava-1.5-llama"), []
    generate(bundle, photos[0], calls, num_beams=2)
    assert (calls[0].kept_tokens, calls[0].images, calls[0].tokens) == (64, 1, 5)

    seen = []

    def note(ids, scores):
        seen.append(1)
        return scores

    generate(bundle, photos[0], calls, logits_processor=[note])
    assert len(seen) == 5
    run = measured(type(bundle.model).generate, calls.append)
    run(bundle.model, bundle.ids("Why?", images=0), do_sample=False, max_new_tokens=2)
    assert (calls[-1].images, calls[-1].kept_tokens) == (0, 0)


def test_it_is_undone(loaded, photos):
    bundle, calls, patches = loaded("llava-1.5-llama"), [], MonkeyPatcher()
    stock = type(bundle.model).generate
    measure_all(patches, calls.append)
    bundle.generate(bundle.ids("What?"), bundle.pixels(photos[0]), [photos[0].size])
    assert len(calls) == 1
    patches.undo()
    assert type(bundle.model).generate is stock
