"""Every way of generating with a method inside the language model."""

import threading

import pytest
import torch
from inside import (
    EOS,
    QUESTIONS,
    RULES,
    TOKENS,
    assert_equal,
    each_rule,
    expected,
    generated,
    prompt_of,
)
from reference_inside import Rule, SlowLlama

from llava_hvp import FastV, prune

pytestmark = pytest.mark.usefixtures("double")
BEAMS, WORDS = 3, 4


def one(bundle, photo, question=QUESTIONS[0], **kwargs):
    return bundle.model.generate(
        bundle.ids(question),
        images=bundle.pixels(photo),
        image_sizes=[photo.size],
        max_new_tokens=WORDS,
        min_new_tokens=WORDS,
        **kwargs,
    )[:, -WORDS:]


def slow_beams(bundle, photo, method, slowly):
    """The best of so many beams: the sums of log probabilities, no word ends one."""
    embeds, visual = prompt_of(bundle, QUESTIONS[0], [photo])
    rule, slow = slowly(method)(int(visual.sum())), SlowLlama(bundle.model)
    beams = [(0.0, [])]
    for _ in range(WORDS):
        found = []
        for score, ids in beams:
            chances = slow(embeds, visual, rule, ids).logits.log_softmax(-1)
            chances[EOS] = float("-inf")
            best = chances.topk(2 * BEAMS)
            found += [
                (score + c, [*ids, i])
                for c, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(found, reverse=True)[:BEAMS]
    return beams[0][1]


@each_rule
def test_beams(deep, photos, method, slowly):
    bundle = deep()
    wanted = slow_beams(bundle, photos[0], method, slowly)
    with prune(bundle.model, method):
        found = one(bundle, photos[0], num_beams=BEAMS, do_sample=False)
    assert found[0].tolist() == wanted


@each_rule
def test_sampling(deep, photos, method, slowly):
    bundle = deep()
    embeds, visual = prompt_of(bundle, QUESTIONS[0], photos[:1])
    rule, slow = slowly(method)(int(visual.sum())), SlowLlama(bundle.model)
    for seed in (0, 1):
        torch.manual_seed(seed)
        ids = []
        for _ in range(WORDS):
            logits = slow(embeds, visual, rule, ids).logits
            logits[EOS] = float("-inf")
            ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
        torch.manual_seed(seed)
        with prune(bundle.model, method):
            found = one(bundle, photos[0], do_sample=True, top_k=0, temperature=1.0)
        assert found[0].tolist() == ids


def test_beams_of_a_ragged_batch_are_each_as_alone(deep, photos):
    bundle, method = deep(), RULES[3][0]
    with prune(bundle.model, method):
        alone = [
            one(bundle, photos[i], q, num_beams=2)[0].tolist() for i, q in enumerate(QUESTIONS)
        ]
        rows = [bundle.ids(q)[0] for q in QUESTIONS]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        together = bundle.model.generate(
            ids,
            attention_mask=mask,
            images=bundle.pixels(*photos[:2]),
            image_sizes=[p.size for p in photos[:2]],
            num_beams=2,
            max_new_tokens=WORDS,
            min_new_tokens=WORDS,
        )
    assert together[:, -WORDS:].tolist() == alone


@each_rule
def test_a_row_of_text_alone_is_as_stock(deep, photos, method, slowly):
    bundle = deep()
    wanted = expected(bundle, QUESTIONS[0], photos[:1], method, slowly)
    ids = bundle.ids(QUESTIONS[1], 0)
    words = bundle.model.get_model().embed_tokens(ids)[0]
    text = SlowLlama(bundle.model).generate(
        words, torch.zeros(len(words), dtype=torch.bool), Rule({}), TOKENS, banned=[EOS]
    )
    with prune(bundle.model, method) as pruned:
        # LLaVA takes an image for a row without one as well, and uses nothing of it.
        found, logits = generated(bundle, QUESTIONS, [photos[:1], []], unused=photos[1:2])
    assert_equal((found[0], logits[0]), wanted)
    assert_equal((found[1], logits[1]), text)
    assert pruned.last[1].average_tokens == 0


def test_text_alone_after_a_prompt_with_images_is_as_stock(deep, photos):
    bundle = deep()
    arguments = {"do_sample": False, "max_new_tokens": WORDS, "min_new_tokens": WORDS}
    ids = bundle.ids(QUESTIONS[0], 0)
    stock = bundle.model.generate(ids, **arguments)
    with prune(bundle.model, FastV(r_max=0.4)):
        one(bundle, photos[0])
        assert torch.equal(bundle.model.generate(ids, **arguments), stock)


@each_rule
def test_two_threads_of_one_model_each_get_what_they_would_alone(deep, photos, method, slowly):
    bundle, barrier = deep(), threading.Barrier(2)
    pictures = photos[:2]
    found, errors = {}, []
    with prune(bundle.model, method) as pruned:
        alone = [one(bundle, p, q).tolist() for p, q in zip(pictures, QUESTIONS, strict=True)]

        def work(number):
            try:
                with torch.no_grad():
                    barrier.wait()
                    for _ in range(3):
                        found[number] = one(bundle, pictures[number], QUESTIONS[number]).tolist()
                assert pruned.last[0].size == pictures[number].size
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert [found[0], found[1]] == alone


@each_rule
@pytest.mark.parametrize("cached", [True, False])
def test_each_layer_holds_what_entered_it(deep, photos, method, slowly, cached):
    bundle = deep()
    ids = bundle.ids(QUESTIONS[0])
    with prune(bundle.model, method) as pruned, torch.no_grad():
        output = bundle.model(
            ids,
            images=bundle.pixels(photos[0]),
            image_sizes=[photos[0].size],
            use_cache=cached,
        )
    tokens = pruned.last[0].layer_tokens
    assert output.logits.shape[1] == tokens[-1] + ids.shape[1] - 1
    assert tokens[0] > tokens[-1] > 0
    if cached:
        lengths = [output.past_key_values.get_seq_length(layer) for layer in range(len(tokens))]
        assert lengths == [count + ids.shape[1] - 1 for count in tokens]


def test_without_a_cache_ids_are_the_same(deep, photos):
    bundle = deep()
    with prune(bundle.model, FastV(r_max=0.4)):
        cached = one(bundle, photos[0], do_sample=False)
        assert torch.equal(one(bundle, photos[0], do_sample=False, use_cache=False), cached)


def test_embeddings_run_twice_are_pruned_twice(deep, photos):
    bundle = deep()
    with prune(bundle.model, FastV(r_max=0.4)), torch.no_grad():
        embeds, *_ = bundle.embeds(
            bundle.ids(QUESTIONS[0]), bundle.pixels(photos[0]), [photos[0].size]
        )
        first, second = (bundle.model(inputs_embeds=embeds).logits for _ in range(2))
    assert first.shape[1] < embeds.shape[1]
    assert torch.equal(first, second)
