"""An image that comes again is not encoded again, and nothing else changes."""

from contextlib import contextmanager

import pytest
import torch

from llava_hvp import HIVTP, HiPrunePlus, Uniform, prune
from llava_hvp.config import Request
from llava_hvp.encoder.partitioned import MARKS
from llava_hvp.encoder.vit import layers_of
from llava_hvp.hook.process import PrunedProcess
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.runtime import PruningConfig


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


@contextmanager
def reusing(model, method, **given):
    """Prune as in a chat."""
    with prune(model, method, **given) as pruned:
        pruned.reuse = True
        yield pruned


def test_the_second_turn_of_a_chat_encodes_nothing(bundle, photos, encodings):
    ids, pixels, sizes = bundle.ids("What is it?"), bundle.pixels(photos[0]), [photos[0].size]
    turns = [ids, torch.cat((ids, ids[:, -5:]), 1)]
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        fresh = [bundle.generate(turn, pixels, sizes) for turn in turns]
        assert len(encodings) == 2
        pruned.reuse = True
        chat = [bundle.generate(turn, pixels, sizes) for turn in turns]
        assert len(encodings) == 3
        assert pruned.last[0].kept_of_stock < 0.8
    assert all(torch.equal(a, b) for a, b in zip(fresh, chat, strict=True))


def test_equal_pixels_in_another_tensor_are_the_same_image(bundle, photos, encodings):
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        for _ in range(2):  # as the worker does: decoded and processed at every request
            bundle.embeds(bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size])
    assert len(encodings) == 1


def test_other_images_in_the_same_memory_are_encoded(bundle, photos, encodings):
    pixels, ids = bundle.pixels(photos[1]), bundle.ids("x")
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        bundle.embeds(ids, pixels, [photos[1].size])
        pixels.mul_(-1)
        second, *_ = bundle.embeds(ids, pixels, [photos[1].size])
    assert len(encodings) == 2
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        assert torch.equal(second, bundle.embeds(ids, pixels, [photos[1].size])[0])


def test_chats_that_take_turns_each_keep_their_image(bundle, photos, encodings):
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        for _ in range(3):
            for photo in photos:
                bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
    assert len(encodings) == len(photos)


def test_equal_tiles_of_one_image_and_of_two_are_told_apart(own, encodings):
    bundle = own("llava-next-llama")
    tiles = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), reusing(bundle.model, HIVTP(num_tokens=32)) as pruned:
        two = pruned.encode(tiles, (1, 1), None).selection.keep
        one = pruned.encode(tiles, (2,), None).selection.keep
    assert len(encodings) == 2
    assert 16 < two.sum(1).max() <= 32
    assert one.sum(1).max() <= 16


def test_old_images_are_let_go(bundle, photos, encodings):
    pixels, ids = bundle.pixels(photos[1]), bundle.ids("x")
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        for shift in range(9):
            bundle.embeds(ids, pixels + shift, [photos[1].size])
        bundle.embeds(ids, pixels, [photos[1].size])  # the oldest of nine, and eight are held
        assert len(encodings) == 10
        bundle.embeds(ids, pixels + 8, [photos[1].size])
        assert len(encodings) == 10


def test_other_weights_encode_again(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    tower = bundle.model.get_vision_tower().vision_tower
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        bundle.embeds(*arguments)
        with torch.no_grad():
            next(tower.parameters()).mul_(0.5)
        bundle.embeds(*arguments)
        assert len(encodings) == 2
        tower.load_state_dict(tower.state_dict())
        bundle.embeds(*arguments)
        assert len(encodings) == 3


def test_methods_that_read_the_prompt_encode_at_every_turn(bundle, photos, encodings):
    with reusing(bundle.model, HiPrunePlus(r_max=0.5), tokenizer=bundle.tokenizer):
        for question in ("What is it?", "And what is behind it?"):
            bundle.embeds(bundle.ids(question), bundle.pixels(photos[1]), [photos[1].size])
    assert len(encodings) == 2


def test_training_after_a_chat_gets_gradients(bundle, photos, encodings):
    ids, pixels, sizes = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        with torch.inference_mode():
            bundle.embeds(ids, pixels, sizes)
        loss = bundle.model(ids, images=pixels, image_sizes=sizes, labels=ids.clamp(min=0)).loss
        loss.backward()
    assert len(encodings) == 2
    assert all(p.grad is not None for p in bundle.model.get_model().mm_projector.parameters())


def test_a_model_forgets_with_its_pruning(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    for r_max in (0.5, 0.25):
        with reusing(bundle.model, HIVTP(r_max=r_max)) as pruned:
            bundle.embeds(*arguments)
            assert pruned.last[0].kept_of_patches <= r_max
    assert len(encodings) == 2


def test_it_is_off_unless_asked_for(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    attention = layers_of(bundle.model.get_vision_tower().vision_tower)[8].self_attn
    kept = []
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        assert not pruned.reuse
        for _ in range(2):
            bundle.embeds(*arguments)
            kept.append(pruned.last[0].selection.keep)
            attention.q_proj.weight.data.mul_(-20)  # leaves no trace
    assert len(encodings) == 2
    assert not torch.equal(*kept)


def test_what_changes_at_the_tower_is_seen(bundle, photos, encodings):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    tower = bundle.model.get_vision_tower()
    block = layers_of(tower.vision_tower)[5]

    def negate(module, args, output):
        return (-output[0], *output[1:]) if isinstance(output, tuple) else -output

    def exchange():
        block.mlp.fc1 = torch.nn.Linear(64, 128)

    changes = (
        lambda: block.register_forward_hook(negate),
        lambda: block.mlp.register_forward_pre_hook(lambda *args: None),
        lambda: setattr(tower, "select_layer", -3),
        exchange,
        lambda: setattr(block.mlp, "forward", lambda hidden: hidden),
    )
    with reusing(bundle.model, HIVTP(r_max=0.25, layers=(7, 8))):
        for number, change in enumerate(changes, 1):
            bundle.embeds(*arguments)
            bundle.embeds(*arguments)
            assert len(encodings) == number
            change()
        last = bundle.embeds(*arguments)[0]
        assert len(encodings) == len(changes) + 1
    with prune(bundle.model, HIVTP(r_max=0.25, layers=(7, 8))):
        assert torch.equal(bundle.embeds(*arguments)[0], last)


def test_another_layer_is_seen_where_no_attention_is_read(bundle, photos, encodings):
    """No hooks are set anew then."""
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    with reusing(bundle.model, Uniform(r_max=0.25)):
        bundle.embeds(*arguments)
        bundle.model.get_vision_tower().select_layer = -3
        bundle.embeds(*arguments)
    assert len(encodings) == 2


class Distributed(torch.nn.Parameter):
    """As a parameter that is a DTensor."""

    placements = ("a part of it",)


@pytest.mark.parametrize("mark", [*sorted(MARKS), "placements"])
def test_partitioned_weights_are_run_every_time(mark, bundle, photos, encodings):
    """A rank that left one run out would meet the others at the wrong weights."""
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    weight = layers_of(bundle.model.get_vision_tower().vision_tower)[3].mlp.fc1.weight
    if mark in MARKS:
        setattr(weight, mark, 7)
    else:
        weight.__class__ = Distributed
    with reusing(bundle.model, HIVTP(r_max=0.5)) as pruned:
        for _ in range(3):
            bundle.embeds(*arguments)
            assert not pruned.last[0].reused
    assert len(encodings) == 3


def test_weights_that_keep_no_count_of_their_changes_are_run_every_time(own, photos, encodings):
    bundle = own("llava-1.5-llama")
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), None
    with torch.inference_mode():
        bundle.model.double().float()
    with reusing(bundle.model, HIVTP(r_max=0.5)):
        for _ in range(2):
            bundle.embeds(*arguments)
    assert len(encodings) == 2


def test_reports_say_that_they_are_of_an_earlier_encoding(bundle, photos):
    arguments = bundle.ids("x"), bundle.pixels(photos[1]), [photos[1].size]
    with reusing(bundle.model, HIVTP(r_max=0.5)) as pruned:
        reports = []
        for _ in range(3):
            bundle.embeds(*arguments)
            reports += pruned.last
    assert [report.reused for report in reports] == [False, True, True]
    said = ["encoded by an earlier call" in repr(report) for report in reports]
    assert said == [False, True, True]
    assert len({report.kept_tokens for report in reports}) == 1


@pytest.mark.parametrize(
    ("command", "reuse"),
    [
        ("llava.serve.cli", True),
        ("llava.serve.model_worker", True),
        ("llava.eval.model_vqa", False),
        ("", False),
    ],
)
def test_chats_and_workers_reuse_and_other_commands_do_not(command, reuse, own):
    bundle = own("llava-1.5-llama")
    with prune(bundle.model, HIVTP()) as pruned:
        PrunedProcess(command, Request(PruningConfig(HIVTP()))).after_load(
            bundle.tokenizer, bundle.model
        )
        assert pruned.reuse is reuse
