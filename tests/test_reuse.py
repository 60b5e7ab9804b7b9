"""An image that comes again is not encoded again, and nothing else changes."""

import pytest
import torch

from llava_hvp import HIVTP, HiPrunePlus, prune
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower


@pytest.fixture
def encodings(monkeypatch):
    """Grows by the number of tiles at each run of the vision encoder."""
    seen = []
    stock = PrunedCLIPVisionTower.encode

    def encode(tower, images, *args):
        seen.append(len(images))
        return stock(tower, images, *args)

    monkeypatch.setattr(PrunedCLIPVisionTower, "encode", encode)
    return seen


@pytest.fixture(params=["llava-1.5-llama", "llava-next-llama"])
def bundle(request, own):
    return own(request.param)


def test_the_second_turn_of_a_chat_encodes_nothing(bundle, photos, encodings):
    ids, pixels, sizes = bundle.ids("What is it?"), bundle.pixels(photos[0]), [photos[0].size]
    turns = [ids, torch.cat((ids, ids[:, -5:]), 1)]
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        pruned.reuse = False
        fresh = [bundle.generate(turn, pixels, sizes) for turn in turns]
        assert len(encodings) == 2
        pruned.reuse = True
        chat = [bundle.generate(turn, pixels, sizes) for turn in turns]
        assert len(encodings) == 3
        assert pruned.last[0].kept_of_stock < 0.8
    assert all(torch.equal(a, b) for a, b in zip(fresh, chat, strict=True))


def test_equal_pixels_in_another_tensor_are_the_same_image(bundle, photos, encodings):
    with prune(bundle.model, HIVTP(r_max=0.5)):
        for _ in range(2):  # as the worker does: decoded and processed at every request
            bundle.embeds(bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size])
    assert len(encodings) == 1


def test_other_images_in_the_same_memory_are_encoded(bundle, photos, encodings):
    pixels, ids = bundle.pixels(photos[1]), bundle.ids("x")
    with prune(bundle.model, HIVTP(r_max=0.5)):
        bundle.embeds(ids, pixels, [photos[1].size])
        pixels.mul_(-1)
        second, *_ = bundle.embeds(ids, pixels, [photos[1].size])
    assert len(encodings) == 2
    with prune(bundle.model, HIVTP(r_max=0.5)):
        assert torch.equal(second, bundle.embeds(ids, pixels, [photos[1].size])[0])


def test_chats_that_take_turns_each_keep_their_image(bundle, photos, encodings):
    with prune(bundle.model, HIVTP(r_max=0.5)):
        for _ in range(3):
            for photo in photos:
                bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
    assert len(encodings) == len(photos)


def test_equal_tiles_of_one_image_and_of_two_are_told_apart(own, encodings):
    bundle = own("llava-next-llama")
    tiles = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), prune(bundle.model, HIVTP(num_tokens=32)) as pruned:
        two = pruned.encode(tiles, (1, 1), None).selection.keep
        one = pruned.encode(tiles, (2,), None).selection.keep
    assert len(encodings) == 2
    assert 16 < two.sum(1).max() <= 32
    assert one.sum(1).max() <= 16


def test_old_images_are_let_go(bundle, photos, encodings):
    pixels, ids = bundle.pixels(photos[1]), bundle.ids("x")
    with prune(bundle.model, HIVTP(r_max=0.5)):
        for shift in range(9):
            bundle.embeds(ids, pixels + shift, [photos[1].size])
        bundle.embeds(ids, pixels, [photos[1].size])  # the oldest of nine, and eight are held
        assert len(encodings) == 10
        bundle.embeds(ids, pixels + 8, [photos[1].size])
        assert len(encodings) == 10


def test_other_weights_encode_again(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    tower = bundle.model.get_vision_tower().vision_tower
    with prune(bundle.model, HIVTP(r_max=0.5)):
        bundle.embeds(*arguments)
        with torch.no_grad():
            next(tower.parameters()).mul_(0.5)
        bundle.embeds(*arguments)
        assert len(encodings) == 2
        tower.load_state_dict(tower.state_dict())
        bundle.embeds(*arguments)
        assert len(encodings) == 3


def test_methods_that_read_the_prompt_encode_at_every_turn(bundle, photos, encodings):
    with prune(bundle.model, HiPrunePlus(r_max=0.5), tokenizer=bundle.tokenizer):
        for question in ("What is it?", "And what is behind it?"):
            bundle.embeds(bundle.ids(question), bundle.pixels(photos[1]), [photos[1].size])
    assert len(encodings) == 2


def test_training_after_a_chat_gets_gradients(bundle, photos, encodings):
    ids, pixels, sizes = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    with prune(bundle.model, HIVTP(r_max=0.5)):
        with torch.inference_mode():
            bundle.embeds(ids, pixels, sizes)
        loss = bundle.model(ids, images=pixels, image_sizes=sizes, labels=ids.clamp(min=0)).loss
        loss.backward()
    assert len(encodings) == 2
    assert all(p.grad is not None for p in bundle.model.get_model().mm_projector.parameters())


def test_a_model_forgets_with_its_pruning(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    for r_max in (0.5, 0.25):
        with prune(bundle.model, HIVTP(r_max=r_max)) as pruned:
            bundle.embeds(*arguments)
            assert pruned.last[0].kept_of_patches <= r_max
    assert len(encodings) == 2
