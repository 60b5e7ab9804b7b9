"""Pruned calls: the right patches, in the right order, for every form of batch."""

import threading
from dataclasses import dataclass

import pytest
import torch
from reference import STOCK_TOKENS
from transformers import CLIPVisionModel

from llava_hvp import (
    HIVTP,
    HiPrune,
    HiPrunePlus,
    Needs,
    Random,
    Selection,
    Uniform,
    VisionContext,
    VisionMethod,
    get_method,
    list_methods,
    prune,
)
from llava_hvp.encoder.vit import transformer
from llava_hvp.methods.masks import top_k
from llava_hvp.runtime import Runtime

BOTH = ["llava-1.5-llama", "llava-next-llama"]
METHODS = {
    "hivtp": HIVTP(r_max=0.5),
    "hiprune": HiPrune(r_max=0.4),
    "hiprune code": HiPrune(num_tokens=40, variant="code"),
    "hiprune++": HiPrunePlus(r_max=0.25),
    "hiprune++ llm": HiPrunePlus(r_max=0.25, text="llm"),
    "random": Random(r_max=0.3),
    "uniform": Uniform(r_max=0.3),
}


def stock_tokens(bundle, pixels, size):
    """(tokens, D) that stock sends for one image, and each token's patch (-1: newline)."""
    ids = bundle.ids("x")
    with torch.no_grad():
        embeds = bundle.model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, pixels, [size]
        )[4][0]
    start = int((ids[0] == -200).nonzero())
    return embeds[start : start + len(embeds) - ids.shape[1] + 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*BOTH, "llava-next-spatial"])
def test_kept_tokens_are_a_subsequence_of_stock(kind, method, loaded, photos):
    """Dropping the pruned tokens from what stock sends gives what we send."""
    bundle, photo = loaded(kind), photos[0]
    pixels, ids = bundle.pixels(photo), bundle.ids("x")
    stock = stock_tokens(bundle, pixels, photo.size)
    with prune(bundle.model, METHODS[method]) as pruned:
        embeds = bundle.embeds(ids, pixels, [photo.size])[0][0]
    start = int((ids[0] == -200).nonzero())
    ours = embeds[start : start + len(embeds) - ids.shape[1] + 1]
    report = pruned.last[0]
    assert len(stock) == report.stock_tokens
    assert len(ours) == report.kept_tokens < report.stock_tokens
    at = 0
    for token in ours:
        matches = (stock[at:] - token).abs().amax(1) < 1e-5
        assert matches.any(), "a token that stock does not send, or out of order"
        at += int(matches.int().argmax()) + 1


@pytest.mark.parametrize("name", ["hivtp", "hiprune", "hiprune++"])
def test_selection_is_the_rule_on_eager_attentions_of_the_same_tower(name, loaded, photos):
    """Against transformers' own attention maps, which no run of ours ever asks for."""
    bundle = loaded("llava-next-336")
    tower = bundle.model.get_vision_tower()
    eager = CLIPVisionModel.from_pretrained(tower.vision_tower_name, attn_implementation="eager")
    eager.load_state_dict(tower.vision_tower.state_dict())
    photo = photos[2]
    pixels = bundle.pixels(photo)
    with torch.no_grad():
        output = eager(pixels[0], output_attentions=True, output_hidden_states=True)
    received = {
        layer + 1: a.float().mean((1, 2))[:, 1:] for layer, a in enumerate(output.attentions)
    }
    method = get_method(name, r_max=0.4)
    with prune(bundle.model, method) as pruned:
        bundle.embeds(bundle.ids("Is there a cup?"), pixels, [photo.size])
        relevance = None
        if name == "hiprune++":
            of = pruned.relevance((5,), [bundle.ids("Is there a cup?")[0]])
            relevance = of(output.hidden_states[23][:, 1:])
    context = VisionContext(
        grid=(24, 24), received_attention=received, depth=24, feature_layer=23, relevance=relevance
    )
    expected = method.select(context)
    assert torch.equal(pruned.last[0].selection.keep, expected.keep)
    assert pruned.last[0].selection.roles.keys() == expected.roles.keys()
    for role, mask in expected.roles.items():
        assert torch.equal(pruned.last[0].selection.roles[role], mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*BOTH, "llava-next-mistral-unfrozen"])
def test_batch_equals_one_at_a_time(kind, method, loaded, photos):
    """Ragged prompts and ragged images; padding masked, on the left, and never attended."""
    bundle = loaded(kind)
    questions = ["What is this?", "How many cups are on the table, and of what colour?", "Why?"]
    pictures = (
        photos[:3] if not bundle.is_next else [photos[0], photos[3].resize((300, 900)), photos[2]]
    )
    rows = [bundle.ids(question)[0] for question in questions]
    pixels = bundle.pixels(*pictures)
    sizes = [picture.size for picture in pictures]
    with prune(bundle.model, METHODS[method]) as pruned:
        alone, reports = [], []
        for row, picture in zip(rows, pictures, strict=True):
            alone.append(bundle.generate(row[None], bundle.pixels(picture), [picture.size])[0])
            reports += pruned.last
        for padding_side in ("left", "right"):
            ids, mask = padded(rows, padding_side)
            together = bundle.generate(ids, pixels, sizes, attention_mask=mask)
            assert torch.equal(together, torch.stack(alone))
        assert [r.kept_tokens for r in pruned.last] == [r.kept_tokens for r in reports]
        for one, other in zip(pruned.last, reports, strict=True):
            assert torch.equal(one.selection.keep, other.selection.keep)


def padded(rows, side):
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, True
    return ids, mask


def test_batch_of_equal_prompts_without_a_mask(loaded, photos):
    """HIVTP keeps a different number of each image: stock's missing mask would attend padding."""
    bundle = loaded("llava-1.5-llama")
    ids, pictures = bundle.ids("What is this?"), photos
    with prune(bundle.model, HIVTP(r_max=0.75)) as pruned:
        alone = torch.cat([bundle.generate(ids, bundle.pixels(p), None) for p in pictures])
        together = bundle.generate(ids.repeat(4, 1), bundle.pixels(*pictures), None)
        assert len({r.kept_tokens for r in pruned.last}) > 1, "the photos should differ"
        embeds, mask, _, _ = bundle.embeds(ids.repeat(4, 1), bundle.pixels(*pictures), None)
    assert torch.equal(alone, together)
    longest = embeds.shape[1]
    lengths = torch.tensor([longest - r.kept_tokens for r in pruned.last])
    lengths = lengths.max() - lengths + mask.sum(1).min()
    assert torch.equal(mask.sum(1), lengths)
    assert all(bool(row[-int(n) :].all()) for row, n in zip(mask, mask.sum(1), strict=True))


def test_given_position_ids_move_with_the_padding(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    rows = [bundle.ids("What is this?")[0], bundle.ids("Why? And what else is there?")[0]]
    ids, mask = padded(rows, "left")
    positions = mask.cumsum(1) - 1
    with prune(bundle.model, HIVTP(r_max=0.5)):
        _, mask, positions, _ = bundle.embeds(
            ids, bundle.pixels(*photos[:2]), None, attention_mask=mask, position_ids=positions
        )
    assert not mask.all()
    for row, places in zip(mask.bool(), positions, strict=True):
        assert torch.equal(places[row], torch.arange(int(row.sum())))


def test_text_only_row_in_a_batch(loaded, photos):
    """LLaVA wants one image for it all the same, and uses none of it."""
    bundle = loaded("llava-1.5-llama")
    rows = [bundle.ids("What is this?")[0], bundle.ids("Who are you?", images=0)[0]]
    ids, mask = padded(rows, "left")
    with prune(bundle.model, HIVTP(r_max=0.5)):
        together = bundle.generate(ids, bundle.pixels(*photos[:2]), None, attention_mask=mask)
        first = bundle.generate(rows[0][None], bundle.pixels(photos[0]), None)
        embeds, mask, _, _ = bundle.embeds(
            ids, bundle.pixels(*photos[:2]), None, attention_mask=mask
        )
    assert torch.equal(together[0], first[0])
    text = bundle.model.get_model().embed_tokens(rows[1])
    assert torch.equal(embeds[1][mask[1].bool()], text)


def test_several_images_in_a_prompt(loaded, photos):
    bundle = loaded("llava-next-llama")
    sizes = [p.size for p in photos[:3]]
    ids = bundle.ids("Which is the odd one out?", images=3)
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        embeds = bundle.embeds(ids, bundle.pixels(*photos[:3]), sizes)[0]
        kept = [r.kept_tokens for r in pruned.last]
        single = []
        for photo in photos[:3]:
            bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
            single += [r.kept_tokens for r in pruned.last]
    assert kept == single
    assert embeds.shape[1] == ids.shape[1] - 3 + sum(kept)


@pytest.mark.parametrize("newline", ["rows", "all", "none"])
def test_newline_policy(newline, loaded, photos):
    bundle, photo = loaded("llava-next-llama"), photos[0]
    runtime = Runtime(newline=newline)
    with prune(bundle.model, Random(num_tokens=20), runtime=runtime) as pruned:
        embeds = bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])[0][0]
    report = pruned.last[0]
    newlines = report.kept_tokens - report.kept_patches
    mark = bundle.model.get_model().image_newline
    assert int((embeds == mark).all(1).sum()) == newlines
    rows = (report.stock_tokens - 64) // 17  # 16 columns and a newline in each
    assert newlines == {"all": rows, "none": 0}.get(newline, newlines)
    if newline == "rows":
        assert 0 < newlines < rows


def test_spatial_merge_on_an_unpad_checkpoint(loaded, photos):
    """What HiPrune and others publish for NeXT: no unpad, no newline, 5 x N tokens before."""
    bundle, photo = loaded("llava-next-llama"), photos[0]
    runtime = Runtime(patch_merge="spatial")
    with prune(bundle.model, HiPrune(num_tokens=100), runtime=runtime) as pruned:
        bundle.embeds(bundle.ids("x"), bundle.pixels(photo), [photo.size])
    report = pruned.last[0]
    assert (report.stock_tokens, report.kept_tokens, report.kept_patches) == (320, 100, 100)


def test_truncation_comes_after_pruning(own, photos):
    bundle = own("llava-1.5-llama")
    ids = bundle.ids("What is this?")
    bundle.model.config.tokenizer_model_max_length = ids.shape[1] - 1 + 40
    assert bundle.embeds(ids, bundle.pixels(photos[0]), None)[0].shape[1] == ids.shape[1] + 39
    with prune(bundle.model, Uniform(num_tokens=32)):
        whole = bundle.embeds(ids, bundle.pixels(photos[0]), None)[0]
    assert whole.shape[1] == ids.shape[1] - 1 + 32


@pytest.mark.parametrize("kind", BOTH)
def test_only_kept_patches_are_projected_and_no_layer_past_the_selected_runs(kind, own, photos):
    bundle = own(kind)
    ran, projected = [], []
    layers = transformer(bundle.model.get_vision_tower().vision_tower).encoder.layers
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    bundle.model.get_model().mm_projector.register_forward_hook(
        lambda module, args, output: projected.append(args[0].shape[:-1].numel())
    )
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size])
    assert ran == list(range(1, 24))
    assert projected == [pruned.last[0].kept_patches]


def test_eight_threads_on_one_model_equal_eight_calls_in_a_row(loaded, photos):
    bundle = loaded("llava-next-llama")
    calls = [
        (bundle.ids(f"Question {i}?"), photos[i % 4].resize((300 + 40 * i, 400))) for i in range(8)
    ]

    def run(i):
        ids, picture = calls[i]
        answer = bundle.generate(ids, bundle.pixels(picture), [picture.size], tokens=4)
        return answer, pruned.last[0]

    with prune(bundle.model, HiPrunePlus(r_max=0.3)) as pruned:
        serial = [run(i) for i in range(8)]
        results = [None] * 8
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, run(i))) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for (answer, report), (other, other_report) in zip(serial, results, strict=True):
        assert torch.equal(answer, other)
        assert torch.equal(report.selection.keep, other_report.selection.keep)


@pytest.mark.parametrize("size", STOCK_TOKENS)
def test_real_counts(size, loaded, photos):
    """LLaVA's own counts; pruned patches within p_max of every tile, for every method."""
    known = STOCK_TOKENS[size]
    bundle, picture = loaded("llava-next-336"), photos[0].resize(size)
    pixels, ids = bundle.pixels(picture), bundle.ids("Where is it?")
    without = bundle.embeds(ids, pixels, [size])[0].shape[1] - ids.shape[1] + 1
    assert without == known
    for name in list_methods(VisionMethod):
        method = get_method(name, r_max=0.25)
        with prune(bundle.model, method) as pruned:
            length = bundle.embeds(ids, pixels, [size])[0].shape[1] - ids.shape[1] + 1
        report = pruned.last[0]
        assert report.stock_tokens == known
        assert length == report.kept_tokens <= report.stock_tokens
        assert report.kept_patches <= 144 * report.tiles
        assert report.kept_of_patches <= 0.25
        assert report.kept_of_stock == report.kept_tokens / known


@dataclass(frozen=True, kw_only=True)
class NearestToTheMean(Uniform):
    """A method of somebody else's, reading what none of ours reads. Not registered: no own name."""

    def reads(self, depth, select):
        return Needs(cls_attention=(2, select), features=True)

    def choose(self, context, budget):
        assert set(context.cls_attention) == {2, 23}
        assert not context.received_attention
        spread = (context.features - context.features.mean(1, keepdim=True)).norm(dim=-1)
        return Selection.from_roles({"uniform": top_k(context.cls_attention[23] - spread, budget)})


def test_a_foreign_method_may_read_cls_attention_and_features(loaded, photos):
    bundle = loaded("llava-next-llama")
    with prune(bundle.model, NearestToTheMean(r_max=0.25)) as pruned:
        bundle.generate(bundle.ids("x"), bundle.pixels(photos[0]), [photos[0].size])
    assert pruned.last[0].selection.keep.sum(1).tolist() == [16] * 5
