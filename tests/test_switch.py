"""One loaded model and many budgets: by block, by call and by thread, on both hosts."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hf_models import HFBundle, needs_release, state

from llava_hvp import HIVTP, FastV, HiPrune, HiPrunePlus, PruMerge, Runtime, Uniform, prune, unprune
from llava_hvp.errors import (
    LlavaHvpError,
    OptionError,
    PrunedStateError,
    TextEncoderError,
    UnsupportedModelError,
)

OWN = HIVTP(r_max=0.5)
OTHERS = (HiPrune(num_tokens=40), HIVTP(r_max=0.25), Uniform(r_max=0.1), PruMerge(r_max=0.25))
HOSTS = ["llava", pytest.param("hf", marks=needs_release)]


@dataclass
class Asked:
    """A model of a host with a batch of two ragged rows to ask it."""

    model: Any
    arguments: dict[str, Any]
    bundle: Any

    def ids(self, **kwargs: Any) -> list[list[int]]:
        given = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4} | kwargs
        ids = self.model.generate(**self.arguments, **given)
        return ids[:, -4:].tolist()

    def by(self, *methods: Any) -> list[list[int]]:
        """What a model that is pruned by nothing else answers."""
        with prune(self.model, *methods):
            return self.ids()


def asked_of(host, loaded, hf, photos, name="llava-next-llama"):
    bundle = loaded(name) if host == "llava" else hf(name)
    pictures, questions = photos[:2], ("What is this?", "How many cups are on the table?")
    if isinstance(bundle, HFBundle):
        return Asked(bundle.model, dict(bundle.ask(*questions, pictures=pictures)), bundle)
    rows = [bundle.ids(question)[0] for question in questions]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(longest - len(r)).long(), r)) for r in rows])
    arguments = {
        "inputs": ids,
        "attention_mask": ids != 0,
        "images": bundle.pixels(*pictures),
        "image_sizes": [picture.size for picture in pictures],
    }
    return Asked(bundle.model, arguments, bundle)


@pytest.fixture(params=HOSTS)
def asked(request, loaded, hf, photos):
    return asked_of(request.param, loaded, hf, photos)


@pytest.fixture(params=HOSTS)
def small(request, loaded, hf, photos):
    """Of one tile an image."""
    return asked_of(request.param, loaded, hf, photos, "llava-1.5-llama")


def kept(pruned):
    return {(report.pruned_by, report.kept_tokens) for report in pruned.last}


def test_a_block_and_a_call_prune_as_a_model_that_is_pruned_so(asked):
    stock, alone = asked.ids(), {method: asked.by(method) for method in (OWN, *OTHERS)}
    assert len({str(ids) for ids in (stock, *alone.values())}) >= 5
    before = state(asked.model)
    with prune(asked.model, OWN) as pruned:
        for method in OTHERS:
            with pruned.using(method) as same:
                assert same is pruned
                assert (pruned.method, pruned.config.method) == (method, method)
                assert asked.ids() == alone[method]
                assert {report.method for report in pruned.last} == {method.name}
                with pruned.using(None):
                    assert asked.ids() == stock
                    assert all(r.kept_tokens == r.stock_tokens for r in pruned.last)
                    assert {report.pruned_by for report in pruned.last} == {"none"}
                assert asked.ids(prune=OWN) == alone[OWN]
                assert asked.ids() == alone[method]
            assert asked.ids(prune=method) == alone[method]
        assert asked.ids(prune=None) == stock
        assert asked.ids(prune={"method": "hivtp", "r_max": 0.25}) == alone[HIVTP(r_max=0.25)]
        assert asked.ids() == alone[OWN]
        assert pruned.method == OWN
    assert state(asked.model) == before


def test_two_threads_with_different_budgets_are_two_models(asked):
    methods = (None, *OTHERS[:3])
    alone = [asked.ids(), *(asked.by(method) for method in methods[1:])]
    own, reports = asked.by(OWN), {}
    together = threading.Barrier(len(methods) + 1)

    def block(method):
        with pruned.using(method):
            together.wait(30)
            answers = [asked.ids() for _ in range(2)]
            reports[str(method)] = kept(pruned)
        return answers

    def calls(method):
        together.wait(30)
        return [asked.ids(prune=method) for _ in range(2)]

    with prune(asked.model, OWN) as pruned, ThreadPoolExecutor(len(methods) + 1) as pool:
        for ask in (block, calls):
            futures = [pool.submit(ask, method) for method in methods]
            together.wait(30)
            assert [asked.ids() for _ in range(2)] == [own] * 2  # this one has the model's own
            assert [future.result(60) for future in futures] == [[ids] * 2 for ids in alone]
        assert {report.pruned_by for report in pruned.last} == {"hivtp r_max=0.5"}
    assert {name for found in reports.values() for name, _ in found} == {
        *("none", "hiprune num_tokens=40", "hivtp r_max=0.25", "uniform r_max=0.1"),
    }
    assert all(len({name for name, _ in found}) == 1 for found in reports.values())


def test_a_thread_that_starts_in_a_block_has_the_models_own(small):
    alone = small.by(OWN)
    with prune(small.model, OWN) as pruned, pruned.using(HIVTP(r_max=0.1)):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(small.ids()))
        thread.start()
        thread.join()
        assert answers == [alone] != [small.ids()]


def test_a_streamer_with_the_call_in_a_thread(small):
    from transformers import TextIteratorStreamer

    tokenizer = getattr(small.bundle, "tokenizer", None) or small.bundle.processor.tokenizer
    texts = []
    arguments = {
        name: value[:1] for name, value in small.arguments.items() if name != "attention_mask"
    }
    if small.bundle.__class__ is HFBundle:
        arguments["attention_mask"] = small.arguments["attention_mask"][:1]
    with prune(small.model, OWN):
        for method in (OWN, HIVTP(r_max=0.1), None):
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
            given = {"streamer": streamer, "prune": method, "do_sample": False}
            thread = threading.Thread(
                target=small.model.generate, kwargs=arguments | given | {"max_new_tokens": 8}
            )
            thread.start()
            texts.append("".join(streamer))
            thread.join()
    assert len(set(texts)) == 3


def test_beams_go_by_the_method_of_the_call(small):
    beams = {"num_beams": 2}
    with prune(small.model, HIVTP(r_max=0.25)):
        alone = small.ids(**beams)
    stock = small.ids(**beams)
    with prune(small.model, OWN):
        assert small.ids(prune=HIVTP(r_max=0.25), **beams) == alone
        assert small.ids(prune=None, **beams) == stock


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ((7,), UnsupportedModelError, "no Method"),
        (("hivpt",), OptionError, "did you mean hivtp"),
        ((HIVTP(layers=(30,)),), OptionError, "layer"),
        ((FastV(layer=40),), OptionError, "layer"),
    ],
)
def test_a_block_that_cannot_be_changes_nothing(methods, error, message, small):
    alone, before = small.by(OWN), state(small.model)
    with prune(small.model, OWN) as pruned:
        with pytest.raises(error, match=message), pruned.using(*methods):
            raise AssertionError("inside")
        with pytest.raises(error, match=message):
            small.ids(prune=methods[0])
        assert (pruned.method, small.ids()) == (OWN, alone)
    assert state(small.model) == before


def test_what_is_held_of_a_pruning_that_is_over_refuses(small):
    with prune(small.model, OWN) as pruned:
        generate = small.model.generate
    with pytest.raises(PrunedStateError, match="not pruned any more"), pruned.using(None):
        pass
    with pytest.raises(PrunedStateError, match="not pruned any more"):
        generate(**small.arguments, prune=None)
    assert "generate" not in vars(small.model)


def test_a_generate_that_was_there_is_called_and_given_back(small, monkeypatch):
    stock, seen = small.model.generate, []

    def generate(*args, **kwargs):
        seen.append(sorted(kwargs))
        return stock(*args, **kwargs)

    small.model.generate = generate
    try:
        with prune(small.model, OWN):
            assert small.ids(prune=None)
        assert small.model.generate is generate
    finally:
        del small.model.generate
    assert len(seen) == 1
    assert "prune" not in seen[0]


def test_reuse_never_gives_another_methods_selection(small):
    alone = {method: small.by(method) for method in (OWN, *OTHERS)}
    with prune(small.model, OWN) as pruned:
        pruned.reuse = True
        again = []
        for method in (*alone, None, *alone):
            ids = small.ids(prune=method)
            assert method is None or ids == alone[method]
            again.append(all(report.reused for report in pruned.last))
        assert again == [False] * 6 + [True] * 5


def test_a_block_that_ends_elsewhere_is_an_error_and_not_silence(small):
    def steps():
        with pruned.using(HIVTP(r_max=0.1)):
            yield

    with prune(small.model, OWN) as pruned:
        generator = steps()
        contextvars.copy_context().run(next, generator)  # as a web server runs each step
        assert pruned.method == OWN
        with pytest.raises(PrunedStateError, match=r"another thread or task.*generate\("):
            next(generator, None)


def test_blocks_that_end_in_another_order_leave_the_one_that_is_open(small):
    with prune(small.model, OWN) as pruned:
        first, second = pruned.using(OTHERS[0]), pruned.using(OTHERS[1])
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert pruned.method == OTHERS[1]
        second.__exit__(None, None, None)
        assert pruned.method == OWN


def test_a_pruning_made_anew_inside_a_block_is_its_own(small):
    with prune(small.model, OWN) as pruned, pruned.using(OTHERS[1]):
        unprune(small.model)
        with prune(small.model, OTHERS[0]) as anew:
            assert anew.method == OTHERS[0]


def test_one_dtype_of_the_tower_cannot_serve_both(small):
    with (
        prune(small.model, OWN, runtime=Runtime(tower_dtype="model")) as pruned,
        pytest.raises(OptionError, match="leave tower_dtype out"),
        pruned.using(None),
    ):
        pass
    with prune(small.model, OWN) as pruned, pytest.raises(OptionError, match="how the model runs"):
        small.ids(prune={"method": "hivtp", "tower_dtype": "model"})


def test_a_method_that_reads_the_prompt_brings_its_text_encoder_when_it_is_first_used(small):
    checkpoint = small.bundle.path
    tokenizer = getattr(small.bundle, "tokenizer", None) or small.bundle.processor
    clip = checkpoint.parent / "clip-112"
    method = HiPrunePlus(r_max=0.25)
    with prune(small.model, method, tokenizer=tokenizer, clip_text=clip) as pruned:
        alone = small.ids()
    with prune(small.model, OWN, tokenizer=tokenizer, clip_text=clip) as pruned:
        assert pruned.clip_text == clip
        assert small.ids(prune=method) == alone
        text = pruned.clip_text
        with pruned.using(method):
            assert small.ids() == alone
        assert pruned.clip_text is text
    with prune(small.model, OWN, tokenizer=tokenizer, clip_text=checkpoint) as pruned:
        with pytest.raises(TextEncoderError, match="no CLIP text"), pruned.using(method):
            pass
        assert pruned.method == OWN


INSIDE = (FastV(layer=1, r_max=0.6), (HIVTP(r_max=0.5), FastV(layer=1, r_max=0.7)))


@pytest.fixture(params=HOSTS)
def two_layers(request, loaded, hf, photos):
    return asked_of(request.param, loaded, hf, photos, "llava-1.5-llama")


def test_methods_inside_the_language_model_come_and_go(two_layers):
    asked = two_layers
    stock, before = asked.ids(), state(asked.model)
    alone = [asked.by(*(m if isinstance(m, tuple) else (m,))) for m in INSIDE]
    own = asked.by(OWN)
    assert len({str(ids) for ids in (stock, own, *alone)}) == 4
    with prune(asked.model, OWN) as pruned:
        for method, ids in zip(INSIDE, alone, strict=True):
            assert asked.ids(prune=method) == ids
            assert pruned.last[0].stage_layers == (1,)
            assert asked.ids() == own
            assert pruned.last[0].stage_layers == ()
            assert asked.ids(prune=None) == stock
    assert state(asked.model) == before
    with prune(asked.model, *INSIDE[1]):
        assert asked.ids(prune=None) == stock
        assert asked.ids(prune=OWN) == own
        assert asked.ids(prune=INSIDE[0]) == alone[0]
        assert asked.ids() == alone[1]
    assert state(asked.model) == before


def test_threads_with_unlike_methods_inside(two_layers):
    asked, methods = two_layers, (None, OWN, *INSIDE, FastV(layer=1, r_max=0.9))
    with prune(asked.model, OWN):
        alone = [asked.ids(prune=method) for method in methods]
        with ThreadPoolExecutor(len(methods)) as pool:
            for _ in range(2):
                assert list(pool.map(lambda m: asked.ids(prune=m), methods)) == alone
    assert len({str(ids) for ids in alone}) >= 4


@needs_release
def test_a_cache_is_gone_on_with_by_the_method_that_filled_it(hf, photos):
    bundle = hf("llava-1.5-llama")
    inputs = bundle.ask("What is this?", pictures=photos[:1])
    given = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    with prune(bundle.model, OWN) as pruned:
        first = bundle.model.generate(**inputs, **given, prune=HIVTP(r_max=0.25))
        cache, length = first.past_key_values, first.past_key_values.get_seq_length()
        longer = torch.cat((first.sequences, inputs["input_ids"][:, -5:]), 1)
        turn = {"input_ids": longer, "past_key_values": cache}
        pixels = {"pixel_values": inputs["pixel_values"]}
        for wrong in ({}, {"prune": None}, {"prune": HiPrune(r_max=0.25)}):
            for more in (pixels, {}):
                with pytest.raises(UnsupportedModelError, match=r"filled by hivtp r_max=0\.25"):
                    bundle.model.generate(**turn, **more, **given, **wrong)
        with (
            pruned.using(None),
            pytest.raises(UnsupportedModelError, match="and this call is pruned by none"),
        ):
            bundle.model(input_ids=longer[:, -1:], past_key_values=cache)
        assert cache.get_seq_length() == length
        second = bundle.model.generate(**turn, **pixels, **given, prune=HIVTP(r_max=0.25))
    with prune(bundle.model, HIVTP(r_max=0.25)):
        fresh = bundle.model.generate(input_ids=longer, **pixels, **given)
    assert torch.equal(second.sequences, fresh.sequences)


@needs_release
def test_a_pipeline_hands_the_method_on(hf, photos):
    from transformers import pipeline

    bundle = hf("llava-1.5-llama")
    given = {"do_sample": False, "max_new_tokens": 6}
    ask = pipeline("image-text-to-text", model=bundle.model, processor=bundle.processor)

    def answer(**kwargs):
        text = "USER: <image>\nWhat is this? ASSISTANT:"
        (found,) = ask(images=[photos[0]], text=[text], generate_kwargs=given | kwargs)
        return (found[0] if isinstance(found, list) else found)["generated_text"]

    stock = answer()
    with prune(bundle.model, HIVTP(r_max=0.1)):
        alone = answer()
        assert answer(prune=None) == stock != alone
    with prune(bundle.model, "none") as pruned:
        assert answer() == stock
        assert answer(prune=HIVTP(r_max=0.1)) == alone
        assert {report.pruned_by for report in pruned.last} == {"hivtp r_max=0.1"}


def test_get_image_features_and_the_tower_go_by_the_block(small):
    if isinstance(small.bundle, HFBundle):

        def tokens():
            with torch.no_grad():
                found = small.model.model.get_image_features(small.arguments["pixel_values"])
            return [len(each) for each in getattr(found, "pooler_output", found)]
    else:

        def tokens():
            with torch.no_grad():
                found = small.model.get_vision_tower()(small.arguments["images"])
            return [len(each) for each in found]

    with prune(small.model, Uniform(num_tokens=9)) as pruned:
        assert tokens() == [9, 9]
        with pruned.using(Uniform(num_tokens=5)):
            assert tokens() == [5, 5]
        with pruned.using(None):
            assert tokens() == [64, 64]


def test_a_refusal_in_one_thread_is_not_anothers(small):
    with prune(small.model, OWN) as pruned:
        alone = small.ids()
        with ThreadPoolExecutor(2) as pool:
            wrong = pool.submit(small.ids, prune=HIVTP(layers=(40,)))
            right = pool.submit(small.ids)
            assert right.result(60) == alone
            with pytest.raises(LlavaHvpError):
                wrong.result(60)
        assert pruned.method == OWN
