"""Qwen2.5-VL of transformers: merged tokens, windows, and positions that stay."""

import copy
import importlib
import sys
from contextlib import contextmanager

import hf_families as tiny
import pytest
import reference
import torch
from hf_families import (
    FULL_LAYERS,
    IMAGE,
    KEEPERS,
    assert_keeping_all_is_stock,
    logits,
    steps,
)
from hf_models import needs_release
from PIL import Image

from llava_hvp import (
    HIVTP,
    FasterVLM,
    HiPrune,
    Random,
    Runtime,
    Uniform,
    prune,
    unprune,
)
from llava_hvp.errors import LlavaHvpError, OptionError, UnsupportedModelError
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release

DEPTH, OBJECT_LAYER = 32, 16  # of HiPrune's released code
TOLERANCE = 2e-5  # of logits up to 1; a position that is off by one moves them by more
ODD, LONG, SMALL = (7, 10), (3, 9), (2, 2)  # tokens: none divides into windows of 4 x 4
ROWS = {
    "one": [([ODD], 5)],
    "ragged": [([ODD], 5), ([LONG], 9), ([SMALL], 2)],
    "2, 0 and 1 images": [([LONG, ODD], 5), ([], 6), ([SMALL], 3)],
    "text": [([], 6)],
}


@pytest.fixture(scope="module")
def model():
    return tiny.qwen()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
def test_keeping_everything_is_stock_bit_for_bit(rows, side, model):
    assert_keeping_all_is_stock(model, tiny.grids(ROWS[rows], side))


# A slow version


@contextmanager
def eager_maps(model):
    """The tower's maps of a pass with eager attention: a list, (heads, n, n) in order of calls."""
    modeling = sys.modules[type(model).__module__]
    stock, maps = modeling.eager_attention_forward, []

    def watched(module, *args, **kwargs):
        output, weights = stock(module, *args, **kwargs)
        if type(module).__name__ == "Qwen2_5_VLVisionAttention":
            maps.append(weights[0].float())
        return output, weights

    before = model.model.visual.config._attn_implementation
    model.model.visual.config._attn_implementation = "eager"
    modeling.eager_attention_forward = watched
    try:
        yield maps
    finally:
        modeling.eager_attention_forward = stock
        model.model.visual.config._attn_implementation = before


def stock_window_index(model, grid_thw):
    """The order in which stock runs the tokens of images."""
    visual = model.model.visual
    if hasattr(visual, "get_window_index"):
        return visual.get_window_index(grid_thw)[0]
    modeling = importlib.import_module(type(model).__module__)
    index, _ = modeling.get_vision_window_index(
        grid_thw,
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
        kwargs={},
    )
    return index


@torch.no_grad()
def slow_image(model, pixels, grid_thw):
    """Layer from 1 -> the score of each token of one image, where attention is full; and tokens."""
    with eager_maps(model) as maps:
        found = type(model.model).get_image_features(model.model, pixels, grid_thw)
    features = getattr(found, "pooler_output", found)[0]
    patches = len(pixels)
    reverse = stock_window_index(model, grid_thw).argsort().tolist()
    scores, call = {}, 0
    for layer in range(1, DEPTH + 1):
        seen = 0
        while seen < patches:
            whole, seen, call = maps[call], seen + maps[call].shape[-1], call + 1
        if layer in FULL_LAYERS:
            assert whole.shape[-1] == patches
            sums = whole.mean(0).sum(0).tolist()
            groups = [sum(sums[n : n + 4]) / 4 for n in range(0, patches, 4)]
            scores[layer] = reference.float32(groups[n] for n in reverse)
    assert call == len(maps)
    return scores, features


def hiprune(scores, grid, budget, variant="paper"):
    return reference.hiprune(scores[OBJECT_LAYER], scores[DEPTH], grid, budget, variant=variant)


METHODS = {
    "hiprune": (HiPrune(r_max=0.3), hiprune, 0.3),
    "hiprune code": (
        HiPrune(r_max=0.5, alpha=0.4, variant="code"),
        lambda scores, grid, budget: reference.hiprune(
            scores[OBJECT_LAYER], scores[DEPTH], grid, budget, alpha=0.4, variant="code"
        ),
        0.5,
    ),
    "hivtp": (
        HIVTP(r_max=0.5),
        lambda scores, grid, budget: reference.hivtp(
            [scores[layer] for layer in (8, 8, 16, 16)], grid, budget
        ),
        0.5,
    ),
    "uniform": (
        Uniform(r_max=0.3),
        lambda scores, grid, budget: reference.uniform(grid[0] * grid[1], budget),
        0.3,
    ),
}


@torch.no_grad()
def slow_row(model, ids, images, tokens):
    """(tokens, V) logits of a row by itself, greedy, no cache; of (grid, features, kept) images."""
    inner = model.model
    wanted = {"input_ids": ids[None]}
    if images:
        wanted["image_grid_thw"] = torch.tensor(
            [[1, rows * 2, columns * 2] for (rows, columns), _, _ in images]
        )
    if release() >= (5, 0):
        wanted["mm_token_type_ids"] = (ids == IMAGE).long()[None]
    long, _ = type(inner).get_rope_index(inner, **wanted)
    parts, places, stack, number = [], [], list(images), -1
    for column, token in enumerate(ids.tolist()):
        if token != IMAGE:
            number = -1
            parts.append(model.get_input_embeddings()(ids[column]))
            places.append(long[:, 0, column])
            continue
        if number < 0:
            _, features, kept = stack.pop(0)
        number += 1
        if number in kept:
            parts.append(features[number])
            places.append(long[:, 0, column])
    assert not stack
    found = []
    following = max(int(place.max()) for place in places) + 1
    for step in range(tokens):
        states = inner.language_model(
            inputs_embeds=torch.stack(parts)[None],
            position_ids=torch.stack(places, dim=1)[:, None],
            use_cache=False,
        )[0]
        found.append(model.lm_head(states[0, -1]))
        parts.append(model.get_input_embeddings()(found[-1].argmax()))
        places.append(torch.full((3,), following + step))
    return torch.stack(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ["one", "ragged", "2, 0 and 1 images"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_what_each_row_is_by_itself_slowly(name, rows, side, model):
    method, rule, share = METHODS[name]
    inputs = tiny.grids(ROWS[rows], side)
    with prune(model, method) as pruned:
        scores, reports = logits(model, inputs), list(pruned.last)
        generated = steps(model, inputs)
    pixels, done = 0, 0
    for row, (held, _) in enumerate(ROWS[rows]):
        images = []
        for grid in held:
            count = grid[0] * grid[1] * 4
            thw = torch.tensor([[1, grid[0] * 2, grid[1] * 2]])
            part = inputs["pixel_values"][pixels : pixels + count]
            pixels += count
            seen, features = slow_image(model, part, thw)
            tokens = grid[0] * grid[1]
            kept = reference.kept(rule(seen, grid, reference.p_max(tokens, r_max=share)))
            images.append((grid, features, kept))
            report = reports[done]
            done += 1
            assert report.grid == grid
            assert set(report.selection.keep[0].nonzero()[:, 0].tolist()) == kept
            assert (report.stock_tokens, report.kept_tokens) == (tokens, len(kept))
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        expected = slow_row(model, real, images, 6)
        length = len(real) - sum(len(f) - len(kept) for _, f, kept in images)
        ours = scores[row, -1] if side == "left" else scores[row, length - 1]
        torch.testing.assert_close(ours, expected[0], atol=TOLERANCE, rtol=0)
        if side == "left":
            torch.testing.assert_close(generated[row], expected, atol=TOLERANCE, rtol=0)


# What stock's callers do


def test_features_alone_are_those_that_a_call_sends(model):
    inputs = tiny.grids(ROWS["2, 0 and 1 images"])
    with prune(model, HiPrune(r_max=0.3)) as pruned, torch.no_grad():
        found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = getattr(found, "pooler_output", found)
    assert [len(tokens) for tokens in features] == [r.kept_tokens for r in pruned.last]
    assert [r.grid for r in pruned.last] == [LONG, ODD, SMALL]


@pytest.mark.parametrize("counted", ["long", "short", "no mask"])
def test_decoding_by_hand_goes_on_after_the_long_prompts_positions(counted, model):
    inputs = tiny.grids(ROWS["2, 0 and 1 images"] if counted != "no mask" else ROWS["one"])
    if counted == "no mask":
        inputs.pop("attention_mask")
    with prune(model, HiPrune(r_max=0.3)), torch.no_grad():
        expected = steps(model, inputs)
        output = model(**inputs, use_cache=True)
        mask = inputs.get("attention_mask")
        if counted == "short":
            short = output.logits.shape[1]
            kept = [int(m.sum()) for m in output.past_key_values.llava_hvp.mask]
            mask = torch.tensor([[0] * (short - k) + [1] * k for k in kept])
        model.model.rope_deltas = None  # of another conversation on this model
        found = [output.logits[:, -1]]
        for _ in range(5):
            given = {}
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
                given["attention_mask"] = mask
            output = model(
                input_ids=found[-1].argmax(-1)[:, None],
                past_key_values=output.past_key_values,
                **given,
            )
            found.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(found, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_beams_and_a_static_cache(model):
    inputs = tiny.grids(ROWS["2, 0 and 1 images"])
    with prune(model, HiPrune(r_max=0.5)):
        static = steps(model, inputs, cache_implementation="static")
        torch.testing.assert_close(static, steps(model, inputs), atol=TOLERANCE, rtol=0)
        beams = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        scored = {"return_dict_in_generate": True, "output_scores": True}
        whole = model.generate(**inputs, **beams, **scored)
        assert whole.sequences.shape == (3, inputs["input_ids"].shape[1] + 5)
        for row, (held, _) in enumerate(ROWS["2, 0 and 1 images"]):
            if held:
                alone = model.generate(**_alone(inputs, row), **beams, **scored)
                assert torch.equal(alone.sequences[0, -5:], whole.sequences[row, -5:])
                torch.testing.assert_close(
                    alone.sequences_scores[0], whole.sequences_scores[row], atol=1e-5, rtol=0
                )


def _alone(inputs, row):
    """One row of a batch as a call by itself."""
    real = inputs["attention_mask"][row].bool()
    per_row = {"input_ids", "attention_mask", "mm_token_type_ids"} & inputs.keys()
    given = {name: inputs[name][row][real][None] for name in per_row}
    tokens = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    first, last = sum(tokens[:row]) * 4, sum(tokens[: row + 1]) * 4
    ends = inputs["image_grid_thw"].prod(1).cumsum(0)
    inside = (ends > first) & (ends <= last)
    given["pixel_values"] = inputs["pixel_values"][first:last]
    given["image_grid_thw"] = inputs["image_grid_thw"][inside]
    return given


def test_text_that_follows_in_the_same_cache(model):
    inputs = tiny.grids(ROWS["one"])
    with prune(model, HiPrune(r_max=0.3)), torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, **_with_cache())
        cache = first.past_key_values
        said = torch.tensor([tiny.words(4, 99)])
        new = torch.cat((first.sequences[:, -1:], said), dim=1)
        output = model(input_ids=new, past_key_values=copy.deepcopy(cache))
        whole = {**inputs, "input_ids": torch.cat((first.sequences, said), dim=1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = (whole["input_ids"] == IMAGE).long()
        expected = logits(model, whole)
        torch.testing.assert_close(output.logits[:, -1], expected[:, -1], atol=TOLERANCE, rtol=0)
        with pytest.raises(UnsupportedModelError, match="empty cache"):
            model.generate(**whole, past_key_values=copy.deepcopy(cache), max_new_tokens=3)
        if release() < (5, 0):
            return  # stock wants the whole conversation's ids beside a cache
        text = {"input_ids": new, "attention_mask": whole["attention_mask"]}
        answered = steps(model, text, 3, past_key_values=cache)
        torch.testing.assert_close(answered, steps(model, whole, 3), atol=TOLERANCE, rtol=0)


def _with_cache():
    return {"return_dict_in_generate": True, "min_new_tokens": 3}


def test_gradients_reach_the_tower(model):
    own = copy.deepcopy(model).train()
    inputs = tiny.grids(ROWS["ragged"], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    stock = own(**inputs, labels=labels).loss
    stock.backward()
    expected = own.model.visual.patch_embed.proj.weight.grad.clone()
    own.zero_grad()
    with prune(own, KEEPERS["choose keeps all"]):
        loss = own(**inputs, labels=labels).loss
        loss.backward()
    assert torch.equal(loss, stock)
    torch.testing.assert_close(own.model.visual.patch_embed.proj.weight.grad, expected)
    own.zero_grad()
    with prune(own, HiPrune(r_max=0.3)):
        own(**inputs, labels=labels).loss.backward()
    assert float(own.model.visual.patch_embed.proj.weight.grad.abs().sum()) > 0


def test_a_model_is_given_back_as_it_was(model):
    before = dict(vars(model)), dict(vars(model.model))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    prune(model, HiPrune(r_max=0.3))
    assert hooks < sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    unprune(model)
    assert (set(vars(model)), set(vars(model.model))) == (set(before[0]), set(before[1]))
    now = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert now == hooks


def test_only_the_layers_that_are_needed_are_read(model):
    for method, layers in ((HiPrune(), [16, 32]), (HIVTP(), [8, 16]), (Random(), [])):
        with prune(model, method):
            hooked = [
                number
                for number, block in enumerate(model.model.visual.blocks, 1)
                if block.attn.qkv._forward_hooks
            ]
        assert hooked == layers


@pytest.mark.parametrize(("asked", "read"), [(1, 8), (11, 8), (12, 16), (17, 16), (20, 24)])
def test_a_windowed_layer_snaps_to_the_nearest_with_full_attention(asked, read, model):
    inputs = tiny.grids(ROWS["one"])
    kept = []
    for layer in (asked, read):
        with prune(model, HiPrune(object_layer=layer, alpha=1, r_max=0.3)) as pruned:
            logits(model, inputs)
            kept.append(pruned.last[0].selection.roles["anchor"])
    assert torch.equal(*kept)


def test_a_picture_of_a_report(model):
    with prune(model, HiPrune(r_max=0.3)) as pruned:
        logits(model, tiny.grids(ROWS["2, 0 and 1 images"]))
    grids = [report.grid for report in pruned.last]
    assert grids == [LONG, ODD, SMALL]
    for report in pruned.last:
        drawn = report.overlay(Image.new("RGB", (300, 200)), scale=1)
        assert drawn.width >= report.grid[1] * 28
        assert "1 tile" in repr(report)


# What is refused


def test_a_runtime_is_refused(model):
    before = set(vars(model))
    for runtime in (Runtime(tower_attention="stock"), Runtime(patch_merge="spatial")):
        with pytest.raises(OptionError, match="takes no Runtime"):
            prune(model, HIVTP(r_max=0.5), runtime=runtime)
    assert set(vars(model)) == before
    with prune(model, HIVTP(r_max=0.5), runtime=Runtime()):
        pass


def test_methods_that_read_what_is_not_there_are_refused(model):
    for method in (FasterVLM(), *_prompt_readers()):
        with pytest.raises(LlavaHvpError) as caught:
            prune(model, method)
        assert "\n" not in str(caught.value)
        assert "llava_hvp" not in vars(model)


def _prompt_readers():
    from llava_hvp import get_method

    return [get_method("mmtok"), get_method("cdpruner")]


def refused(inputs):
    """name -> (changed arguments, words of the error)."""
    ids = inputs["input_ids"]
    changes = {
        "video": ({"pixel_values_videos": torch.zeros(4, 1176)}, "videos"),
        "no grid": ({"image_grid_thw": None}, "without image_grid_thw"),
        "frames": ({"image_grid_thw": torch.tensor([[2, 14, 10]])}, "1 x rows x columns"),
        "another grid": ({"image_grid_thw": torch.tensor([[1, 14, 18]])}, "1 x rows x columns"),
        "fewer ids": (
            {k: v[:, :-40] for k, v in inputs.items() if v.shape == ids.shape},
            "do not match",
        ),
        "positions": ({"position_ids": torch.arange(ids.shape[1])[None]}, "position_ids"),
    }
    if "mm_token_type_ids" in inputs:
        changes["no types"] = {"mm_token_type_ids": None}, "mm_token_type_ids"
    return changes


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_what_cannot_be_right_is_refused(way, model):
    inputs = tiny.grids(ROWS["one"])
    for name, (changed, said) in refused(inputs).items():
        with prune(model, HiPrune()):
            call = model if way == "forward" else model.generate
            with pytest.raises(UnsupportedModelError, match=said) as caught:
                call(**{**inputs, **changed})
        assert "\n" not in str(caught.value), name
