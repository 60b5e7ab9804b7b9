"""transformers' own LLaVA, pruned: conversations with a cache, and decoding loops by hand."""

import pytest
import torch
from hf_models import KINDS, QUESTIONS, batch, needs_release, sized

from llava_hvp import HIVTP, get_method, prune
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf import forward
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


def first_turn(bundle, photos):
    """The prompt of a first turn."""
    return bundle.inputs("USER: <image>\nWhat is this? ASSISTANT:", photos[:1])


@pytest.mark.parametrize("name", ["hivtp", "hiprune++", "uniform"])
def test_a_second_turn_goes_on_from_the_firsts_cache(name, bundle, photos):
    method = get_method(name, r_max=0.25, **({"text": "llm"} if name == "hiprune++" else {}))
    inputs = first_turn(bundle, photos)
    given = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    more = bundle.processor.tokenizer(" USER: And where? ASSISTANT:", return_tensors="pt")
    with prune(bundle.model, method, tokenizer=bundle.processor) as pruned:
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
        kept = pruned.last
        ids = torch.cat((first.sequences, more["input_ids"][:, 1:]), 1)
        second = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cached = bundle.model.generate(**second, **given, past_key_values=first.past_key_values)
        assert pruned.last is kept  # the image is in the cache: nothing is encoded again
        if name != "hiprune++":  # the prompt has changed, and with it what would be kept
            assert torch.equal(cached, bundle.model.generate(**second, **given))
        text = {k: v for k, v in second.items() if k in ("input_ids", "attention_mask")}
        again = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
        without = bundle.model.generate(**text, **given, past_key_values=again.past_key_values)
    assert torch.equal(without, cached)
    assert torch.equal(cached[:, : ids.shape[1]], ids)


def test_a_step_inside_generate_is_stocks_own(bundle, photos, monkeypatch):
    inputs = first_turn(bundle, photos)
    given = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with prune(bundle.model, METHOD):
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)

        def rewritten(*args):
            raise AssertionError("the prompt is short already")

        monkeypatch.setattr(forward, "_rewritten", rewritten)
        ids = torch.cat((first.sequences, first.sequences[:, -3:]), 1)
        second = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        bundle.model.generate(**second, **given, past_key_values=first.past_key_values)
        bundle.model.generate(**inputs, **given)


def test_a_new_image_after_a_cache(bundle, photos):
    pictures = sized(photos)
    inputs = first_turn(bundle, pictures)
    given = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    with prune(bundle.model, METHOD) as pruned:
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
        both = bundle.inputs("USER: <image> and <image>\nWhich? ASSISTANT:", pictures[:2])
        token, long = bundle.model.config.image_token_id, first.sequences.shape[1]
        new = (both["input_ids"][0] == token).nonzero()[pruned.last[0].stock_tokens :, 0]
        ids = torch.cat((first.sequences, both["input_ids"][:, new[0] :]), 1)
        second = {**both, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert ids.shape[1] > long
        if release() < (5, 0):
            with pytest.raises(UnsupportedModelError, match="new image"):
                bundle.model.generate(**second, **given, past_key_values=first.past_key_values)
            return
        cached = bundle.model.generate(**second, **given, past_key_values=first.past_key_values)
        assert len(pruned.last) == 1
        assert torch.equal(cached, bundle.model.generate(**second, **given))


def test_caches_of_another_prompt_are_refused(hf, photos):
    bundle = hf(KINDS[0])
    inputs = first_turn(bundle, photos)
    given = {"do_sample": False, "max_new_tokens": 4}
    stock = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
    longer = {**inputs, "input_ids": torch.cat((stock.sequences, stock.sequences[:, :1]), 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    other = bundle.ask("Where is it, and what else is there to see?", pictures=photos[:1])
    with prune(bundle.model, METHOD):
        with pytest.raises(UnsupportedModelError, match="not filled by this pruned"):
            bundle.model.generate(**longer, **given, past_key_values=stock.past_key_values)
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
        with pytest.raises(UnsupportedModelError, match="whole conversation"):
            bundle.model.generate(**other, **given, past_key_values=first.past_key_values)


# Decoding loops written by hand


@pytest.mark.parametrize("counts", ["nothing", "mask", "mask and positions", "everything"])
def test_a_loop_by_hand_that_counts_the_long_prompt(counts, bundle, photos):
    inputs, _ = batch(bundle, photos)
    if counts == "nothing":
        inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with prune(bundle.model, METHOD), torch.no_grad():
        expected = bundle.generate(inputs, tokens=4)
        given = {} if counts == "nothing" else {"attention_mask": mask}
        if "positions" in counts or counts == "everything":
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if counts == "everything":
            given["cache_position"] = torch.arange(ids.shape[1])
        pixels = {k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
        output = bundle.model(input_ids=ids, **pixels, **given, use_cache=True)
        assert output.logits.shape[1] < ids.shape[1]
        found = [output.logits[:, -1].argmax(-1)]
        for step in range(3):
            if "attention_mask" in given:
                one = torch.ones_like(mask[:, :1])
                given["attention_mask"] = torch.cat((given["attention_mask"], one), 1)
            if "position_ids" in given:
                given["position_ids"] = given["position_ids"][:, -1:] + 1
            if "cache_position" in given:
                given["cache_position"] = torch.tensor([ids.shape[1] + step])
            output = bundle.model(
                input_ids=found[-1][:, None],
                past_key_values=output.past_key_values,
                use_cache=True,
                **given,
            )
            found.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(found, 1), expected)


def test_a_loop_with_a_static_cache_fills_it_without_a_hole(hf, photos):
    from transformers import StaticCache

    bundle = hf(KINDS[1])
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    long = inputs["input_ids"].shape[1]
    with prune(bundle.model, METHOD), torch.no_grad():
        expected = bundle.generate(inputs, tokens=3)
        cache = StaticCache(config=bundle.model.config.get_text_config(), max_cache_len=long + 8)
        output = bundle.model(**inputs, past_key_values=cache, cache_position=torch.arange(long))
        found = [output.logits[:, -1].argmax(-1)]
        for step in range(2):
            output = bundle.model(
                input_ids=found[-1][:, None],
                past_key_values=cache,
                cache_position=torch.tensor([long + step]),
            )
            found.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(found, 1), expected)


def test_counts_that_fit_no_prompt_are_refused(hf, photos):
    bundle = hf(KINDS[0])
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    with prune(bundle.model, METHOD), torch.no_grad():
        cache = bundle.model(**inputs).past_key_values
        step = {"input_ids": torch.tensor([[300]]), "past_key_values": cache}
        with pytest.raises(UnsupportedModelError, match="begin at"):
            bundle.model(**step, position_ids=torch.tensor([[40]]))
        with pytest.raises(UnsupportedModelError, match="attention_mask of shape"):
            bundle.model(**step, attention_mask=torch.ones(1, 40))
        cache.crop(-10)
        with pytest.raises(UnsupportedModelError, match="cropped"):
            bundle.model(**step)
