"""transformers' own LLaVA: every way to generate, pruned."""

import threading

import pytest
import torch
from hf_models import KINDS, QUESTIONS, batch, load, needs_release, sized

from llava_hvp import HIVTP, prune

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


def tail(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :]


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_ragged_batch_equals_its_rows(way, bundle, photos):
    inputs, rows = batch(bundle, photos)
    given = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **WAYS[way]}
    with prune(bundle.model, METHOD) as pruned:
        alone = [tail(bundle.model.generate(**row, **given), row) for row in rows]
        together = bundle.model.generate(**inputs, **given)
        assert len(pruned.last) == 3
        assert all(r.kept_tokens < r.stock_tokens for r in pruned.last)
    prompts = inputs["input_ids"].repeat_interleave(len(together) // 3, 0)
    assert torch.equal(together[:, : prompts.shape[1]], prompts)
    assert torch.equal(tail(together, inputs), torch.cat(alone))


def test_sampling_goes_by_the_seed_and_returns_several(bundle, photos):
    inputs, _ = batch(bundle, photos)
    given = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6, "top_k": 20}
    with prune(bundle.model, METHOD):
        torch.manual_seed(0)
        first = bundle.model.generate(**inputs, **given)
        torch.manual_seed(0)
        again = bundle.model.generate(**inputs, **given)
    assert torch.equal(first, again)
    assert len(first) == 6
    assert not torch.equal(tail(first, inputs)[0], tail(first, inputs)[1])


def test_lengths_count_the_prompt_as_the_processor_made_it(bundle, photos):
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    long = inputs["input_ids"].shape[1]
    config = bundle.model.generation_config.from_dict(bundle.model.generation_config.to_dict())
    config.max_length, config.min_length, config.do_sample = long + 4, long + 4, False
    with prune(bundle.model, METHOD):
        by_argument = bundle.model.generate(
            **inputs, do_sample=False, max_length=long + 4, min_length=long + 4
        )
        by_config = bundle.model.generate(**inputs, generation_config=config)
        expected = bundle.generate(inputs, tokens=4)
        with pytest.raises(ValueError, match="max_length"):
            bundle.model.generate(**inputs, max_length=long)
    assert config.max_length == long + 4
    assert torch.equal(by_argument, torch.cat((inputs["input_ids"], expected), 1))
    assert torch.equal(by_config, by_argument)


def test_ids_may_come_by_place(bundle, photos):
    inputs = dict(bundle.ask(QUESTIONS[0], pictures=photos[:1]))
    with prune(bundle.model, METHOD):
        expected = bundle.model.generate(**inputs, do_sample=False, max_new_tokens=4)
        ids = inputs.pop("input_ids")
        assert torch.equal(
            expected, bundle.model.generate(ids, **inputs, do_sample=False, max_new_tokens=4)
        )
        assert torch.equal(
            expected, bundle.model.generate(inputs=ids, **inputs, do_sample=False, max_new_tokens=4)
        )


def test_a_default_length_is_new_tokens(hf, photos):
    bundle = hf(KINDS[0])
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    stock = bundle.model.generate(**inputs, do_sample=False)
    with prune(bundle.model, METHOD):
        pruned = bundle.model.generate(**inputs, do_sample=False)
    assert stock.shape == pruned.shape


def test_whoever_watches_sees_the_long_prompt(bundle, photos):
    from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    inputs = bundle.ask(*QUESTIONS[:2], pictures=sized(photos)[:2])
    long = inputs["input_ids"].shape[1]
    seen = []

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids)
            return torch.full((len(input_ids),), input_ids.shape[1] >= long + 3)

    def processor(input_ids, scores):
        seen.append(input_ids)
        return scores

    def allowed(row, ids):
        assert torch.equal(ids[:long], inputs["input_ids"][row])
        return [300, 301 + row]

    with prune(bundle.model, METHOD):
        out = bundle.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=8,
            stopping_criteria=StoppingCriteriaList([AfterThree()]),
            logits_processor=LogitsProcessorList([processor]),
            prefix_allowed_tokens_fn=allowed,
        )
    assert out.shape[1] == long + 3
    assert len(seen) == 6
    assert all(torch.equal(ids[:, :long], inputs["input_ids"]) for ids in seen)
    assert set(out[:, long:].flatten().tolist()) <= {300, 301, 302}


def test_a_streamer_sees_the_long_prompt_first(hf, photos):
    from transformers import TextIteratorStreamer

    bundle = hf(KINDS[1])
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    for skip in (True, False):
        streamer = TextIteratorStreamer(bundle.processor.tokenizer, skip_prompt=skip)
        given = {**inputs, "do_sample": False, "max_new_tokens": 5, "streamer": streamer}
        with prune(bundle.model, METHOD):
            expected = bundle.model.generate(**inputs, do_sample=False, max_new_tokens=5)[0]
            thread = threading.Thread(target=bundle.model.generate, kwargs=given)
            thread.start()
            text = "".join(streamer)
            thread.join()
        shown = expected[inputs["input_ids"].shape[1] :] if skip else expected
        assert text == bundle.processor.tokenizer.decode(shown)


def test_a_pipeline_with_a_chat_template(bundle, photos):
    from transformers import pipeline

    content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": QUESTIONS[0]}]
    chat = [{"role": "user", "content": content}]
    pipe = pipeline("image-text-to-text", model=bundle.model, processor=bundle.processor)
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    prompt = bundle.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = bundle.processor(images=photos[0], text=prompt, return_tensors="pt")
    with prune(bundle.model, METHOD) as pruned:
        said = pipe(text=chat, generate_kwargs=given, return_full_text=False)
        assert pruned.last[0].kept_tokens < pruned.last[0].stock_tokens
        expected = bundle.generate(inputs, tokens=5)[0]
    text = bundle.processor.tokenizer.decode(expected)
    assert said[0]["generated_text"].strip() == text.strip()


def test_threads_generate_side_by_side(hf, photos):
    bundle = hf(KINDS[1])
    asked = [bundle.ask(q, pictures=[p]) for q, p in zip(QUESTIONS, sized(photos), strict=True)]
    with prune(bundle.model, METHOD) as pruned:
        expected = [bundle.generate(inputs) for inputs in asked]
        found, counts = {}, {}

        def run(number):
            found[number] = bundle.generate(asked[number])
            counts[number] = pruned.last[0].size

        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(3))
    assert [counts[n] for n in range(3)] == [picture.size for picture in sized(photos)]


def test_a_generate_that_the_user_set_is_called_and_given_back(hf, photos):
    bundle = hf(KINDS[0])
    calls = []
    stock = bundle.model.generate

    def generate(*args, **kwargs):
        calls.append(kwargs["inputs_embeds"].shape[1])
        return stock(*args, **kwargs)

    bundle.model.generate = generate
    try:
        inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
        with prune(bundle.model, METHOD):
            bundle.model.generate(**inputs, max_new_tokens=2)
        assert calls == [inputs["input_ids"].shape[1] - 48]
        assert bundle.model.generate is generate
    finally:
        del bundle.model.generate


def test_load_is_what_a_user_does(hf):
    bundle = hf(KINDS[0])
    assert load(bundle.path).model.config.to_dict() == bundle.model.config.to_dict()
