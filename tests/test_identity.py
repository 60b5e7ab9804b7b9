"""Where nothing is pruned, nothing changes: bit for bit, on every checkpoint and input form."""

import pytest
import torch
from conftest import KINDS

from llava_hvp import HIVTP, HiPrune, Random, Selection, prune
from llava_hvp.runtime import Runtime


class KeepEverything(HiPrune):
    """Goes the whole way, capture included, and keeps every patch. Not registered: no own name."""

    def choose(self, context, budget):
        assert set(context.received_attention) == {9, 23}
        keep = torch.ones_like(context.received_attention[9], dtype=torch.bool)
        none = torch.zeros_like(keep)
        return Selection.from_roles({"anchor": keep, "buffer": none, "register": none})


KEEPERS = {
    "r_max=1": HIVTP(r_max=1),
    "random r_max=1": Random(r_max=1),
    "k=100": HIVTP(k=100, window=None),
    "choose keeps all": KeepEverything(r_max=0.5),
}


def runtime_of(keeper):
    """Where transformers has eager attention only, our own would round otherwise."""
    return None if "r_max" in keeper else Runtime(tower_attention="stock")


def forms(bundle, photos):
    """name -> (ids, images, sizes, mask) for every way that images come in."""
    one, two, tall = photos[0], photos[1], photos[3].resize((300, 900))
    batch = torch.cat([bundle.ids("What is this?")] * 2)
    mask = torch.ones_like(batch, dtype=torch.bool)
    pixels = bundle.pixels(one)
    result = {
        "4-D or 5-D": (bundle.ids("What is this?"), pixels, [one.size], None),
        "list": (bundle.ids("What is this?"), [pixels[0]], [one.size], None),
        "batch": (batch, torch.cat([pixels, pixels]), [one.size] * 2, None),
        "two in a prompt": (
            bundle.ids("Are they the same?", images=2),
            bundle.pixels(one, two),
            [one.size, two.size],
            None,
        ),
    }
    if bundle.is_next:  # different tile counts, which make even stock's batch ragged
        mixed = list(bundle.pixels(one, tall))
        result["mixed list"] = (batch, mixed, [one.size, tall.size], mask)
    return result


@pytest.fixture(scope="module")
def stock(loaded, photos):
    """What unpruned LLaVA gives for each form, computed once a kind."""
    results = {}

    def of(kind):
        if kind not in results:
            bundle = loaded(kind)
            results[kind] = [
                (
                    name,
                    form,
                    bundle.embeds(*form[:3], attention_mask=form[3]),
                    bundle.generate(*form[:3], attention_mask=form[3]),
                )
                for name, form in forms(bundle, photos).items()
            ]
        return results[kind]

    return of


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("-336")])
def test_keeping_everything_is_stock_bit_for_bit(kind, keeper, loaded, stock):
    expected = stock(kind)
    bundle = loaded(kind)
    for name, form, embeds, ids in expected:
        with prune(bundle.model, KEEPERS[keeper], runtime=runtime_of(keeper)) as pruned:
            ours = bundle.embeds(*form[:3], attention_mask=form[3])
            assert torch.equal(ids, bundle.generate(*form[:3], attention_mask=form[3])), name
        for a, b in zip(embeds, ours, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name
        assert all(r.kept_tokens == r.stock_tokens for r in pruned.last), name


@pytest.mark.parametrize("kind", ["llava-1.5-336", "llava-next-336"])
def test_keeping_everything_is_stock_at_full_size(kind, loaded, photos):
    bundle = loaded(kind)
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    expected = bundle.embeds(*arguments)[0]
    with prune(bundle.model, KEEPERS["choose keeps all"], runtime=runtime_of("choose")):
        assert torch.equal(expected, bundle.embeds(*arguments)[0])


def test_the_comparison_can_fail(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    ids, images = bundle.ids("What is this?"), bundle.pixels(photos[0])
    stock = bundle.generate(ids, images, None)
    with prune(bundle.model, HIVTP(r_max=0.25)):
        ours = bundle.generate(ids, images, None)
        shorter = bundle.embeds(ids, images, None)[0]
    assert not torch.equal(stock, ours)
    assert shorter.shape[1] < bundle.embeds(ids, images, None)[0].shape[1]


def test_float16_too(checkpoints, photos):
    from llava.model.builder import load_pretrained_model

    path = checkpoints("llava-next-llama")
    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), None, path.name, device="cpu", device_map="cpu"
    )
    from llava.mm_utils import process_images, tokenizer_image_token

    images = process_images([photos[0]], processor, model.config).half()
    ids = tokenizer_image_token("USER: <image>\nWhat? ASSISTANT:", tokenizer, return_tensors="pt")
    arguments = (ids[None], None, None, None, None, images, [photos[0].size])
    with torch.no_grad():
        stock = model.prepare_inputs_labels_for_multimodal(*arguments)[4]
        with prune(model, KEEPERS["choose keeps all"], runtime=runtime_of("choose")):
            ours = model.prepare_inputs_labels_for_multimodal(*arguments)[4]
    assert stock.dtype == ours.dtype == torch.float16
    assert torch.equal(stock, ours)
