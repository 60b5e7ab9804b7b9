"""Methods inside the language model on transformers' own classes: the same as on LLaVA's."""

import copy
import io

import hf_families as tiny
import hf_models
import pytest
import torch
from hf_models import as_llavas, batch, needs_release
from inside import DEPTH, QUESTIONS, RULES, default_dtype
from test_inside_model import hooks_of

from llava_hvp import HIVTP, FastV, HiPrune, PyramidDrop, SparseVLM, prune, unprune
from llava_hvp.errors import LayerError, LlavaHvpError, OptionError, UnsupportedModelError

pytestmark = [needs_release, pytest.mark.usefixtures("double")]
KINDS = [
    "llava-1.5-llama-deep",
    "llava-1.5-mistral-deep",
    "llava-next-llama-deep",
    "llava-next-mistral-deep",
]
METHODS = [rule[0] for rule in RULES]
NAMES = ["fastv", "pyramiddrop", "pyramiddrop-halves", "sparsevlm", "sparsevlm-2.0"]
each_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)
FIRST = HIVTP(r_max=0.5)
FASTV = METHODS[0]


def open_hf(path):
    """The HFBundle of a checkpoint of `deep`, in float64."""
    with default_dtype(torch.float32):
        bundle = hf_models.load(hf_models.convert(path, path.with_name(f"{path.name}-hf")))
    bundle.model.double()
    return bundle


@pytest.fixture(scope="module")
def pair(deep):
    """A function from a kind to both models of it."""
    bundles = {}

    def get(kind=KINDS[0]):
        theirs = deep(kind)
        if kind not in bundles:
            bundles[kind] = open_hf(theirs.path)
        assert "llava_hvp" not in bundles[kind].model.__dict__, "a test left its pruning on"
        return bundles[kind], theirs

    return get


@pytest.fixture
def bundle(pair):
    return pair()[0]


def prompts(bundle, photos):
    """One row alone, and a ragged batch of rows with one image, two and none."""
    return bundle.ask(QUESTIONS[1], pictures=photos[:1]), batch(bundle, photos)[0]


def on_llavas(bundle, theirs, inputs, **kwargs):
    """Ids of LLaVA's host for the same prompts, and the reports of the images that are used."""
    ids, mask, pixels, sizes = as_llavas(bundle, inputs)
    pixels, sizes = list(pixels), list(sizes)
    # LLaVA takes an image for a row without one as well, and uses nothing of it.
    unused = [sum((r == -200).sum() for r in ids[:n]) for n, r in enumerate(ids) if -200 not in r]
    for place in unused:
        pixels.insert(int(place), pixels[0])
        sizes.insert(int(place), sizes[0])
    pixels = [p.double() for p in pixels]
    found = theirs.generate(
        ids,
        pixels if bundle.is_next else torch.stack(pixels),
        sizes,
        tokens=5,
        attention_mask=mask,
        **kwargs,
    )
    reports = theirs.model.llava_hvp.last
    return found, [r for n, r in enumerate(reports) if n not in unused]


def assert_alike(ours, theirs):
    """Reports of the same images."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.method == b.method
        assert torch.equal(a.sent, b.sent)
        assert (a.kept_tokens, a.stock_tokens) == (b.kept_tokens, b.stock_tokens)
        assert a.layer_tokens == b.layer_tokens
        assert a.layer_tokens[-1] < a.layer_tokens[0] == a.kept_tokens
        assert a.stage_layers == b.stage_layers
        assert len(a.stages) == len(b.stages) > 0
        for mine, other in zip(a.stages, b.stages, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "after hivtp"])
@each_method
@pytest.mark.parametrize("kind", KINDS)
def test_masks_layers_and_greedy_ids_are_those_of_llavas_host(kind, method, together, pair, photos):
    ours, theirs = pair(kind)
    methods = (FIRST, method) if together else (method,)
    with prune(theirs.model, *methods), prune(ours.model, *methods) as pruned:
        for inputs in prompts(ours, photos):
            expected, reports = on_llavas(ours, theirs, inputs)
            assert torch.equal(ours.generate(inputs, tokens=5), expected)
            assert_alike(pruned.last, reports)


@pytest.mark.parametrize("beams", [2, 3])
@each_method
def test_beams_are_those_of_llavas_host(method, beams, pair, photos):
    ours, theirs = pair()
    _, inputs = prompts(ours, photos)
    with prune(theirs.model, method), prune(ours.model, method) as pruned:
        expected, reports = on_llavas(ours, theirs, inputs, num_beams=beams)
        assert torch.equal(ours.generate(inputs, tokens=5, num_beams=beams), expected)
        assert_alike(pruned.last, reports)


@each_method
def test_a_batch_is_as_its_rows_alone(method, bundle, photos):
    together, rows = batch(bundle, photos)
    with prune(bundle.model, method):
        found = bundle.generate(together)
        alone = torch.cat([bundle.generate(row) for row in rows])
    assert torch.equal(found, alone)


@each_method
def test_a_loop_by_hand_goes_on_as_generate_does(method, bundle, photos):
    inputs, _ = batch(bundle, photos)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with prune(bundle.model, FIRST, method) as pruned, torch.no_grad():
        expected = bundle.generate(inputs, tokens=4)
        output = bundle.model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        lengths = layer_lengths(output.past_key_values)
        found = []
        for step in range(4):
            logits = output.logits[:, -1]
            logits[:, bundle.model.generation_config.eos_token_id] = float("-inf")
            found.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            output = bundle.model(
                input_ids=found[-1],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
            )
            assert layer_lengths(output.past_key_values) == [n + step + 1 for n in lengths]
    assert torch.equal(torch.cat(found, 1), expected)
    assert output.logits.shape[1] == 1
    assert pruned.last[0].layer_tokens[-1] < pruned.last[0].layer_tokens[0]
    assert mask.shape[1] == ids.shape[1] + 4


def layer_lengths(cache):
    """Tokens that each layer of a cache holds."""
    return [cache.get_seq_length(layer) for layer in range(DEPTH)]


@pytest.mark.parametrize("methods", [METHODS[:1], METHODS[3:4], [FIRST, METHODS[1]]], ids=str)
def test_each_layer_holds_what_entered_it(methods, bundle, photos):
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    with prune(bundle.model, *methods) as pruned, torch.no_grad():
        outputs = [bundle.model(**inputs), bundle.model.model(**inputs)]
        given = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
        generated = bundle.model.generate(**inputs, **given)
    tokens = pruned.last[0].layer_tokens
    text = inputs["input_ids"].shape[1] - pruned.last[0].stock_tokens
    for output in outputs:
        assert layer_lengths(output.past_key_values) == [n + text for n in tokens]
    assert layer_lengths(generated.past_key_values) == [n + text + 2 for n in tokens]
    assert outputs[0].logits.shape[1] == tokens[-1] + text
    assert tokens[0] > tokens[-1] > 0


@pytest.mark.parametrize("kind", [FastV, PyramidDrop, SparseVLM])
@pytest.mark.parametrize("name", [KINDS[0], KINDS[3]])
def test_a_budget_of_all_is_stock_bit_for_bit(name, kind, pair, photos):
    bundle = pair(name)[0]
    for inputs in prompts(bundle, photos):
        stock = bundle.logits(inputs), bundle.generate(inputs)
        with prune(bundle.model, kind(r_max=1)) as pruned:
            assert torch.equal(bundle.logits(inputs), stock[0])
            assert torch.equal(bundle.generate(inputs), stock[1])
        for report in pruned.last:
            assert report.layer_tokens == (report.stock_tokens,) * DEPTH
            assert all(torch.equal(stage, report.sent) for stage in report.stages)


@pytest.mark.parametrize("methods", [[FIRST, FASTV], [METHODS[3]]], ids=["both", "alone"])
def test_unprune_gives_the_model_back(methods, bundle, photos):
    inputs, _ = batch(bundle, photos)
    stock, before = bundle.logits(inputs), hooks_of(bundle.model)
    prune(bundle.model, *methods)
    assert hooks_of(bundle.model) != before
    assert bundle.logits(inputs).shape != stock.shape
    unprune(bundle.model)
    assert hooks_of(bundle.model) == before
    assert torch.equal(bundle.logits(inputs), stock)


@pytest.mark.parametrize(
    "method",
    [FastV(r_max=0.05), FastV(layer=DEPTH), PyramidDrop(layers=(1, 99)), SparseVLM(r_max=0.1)],
    ids=str,
)
def test_what_the_depth_does_not_allow_leaves_the_model_as_it_was(method, bundle):
    before = hooks_of(bundle.model)
    with pytest.raises((OptionError, LayerError)):
        prune(bundle.model, method)
    assert hooks_of(bundle.model) == before


@pytest.mark.parametrize("family", ["onevision", "qwen"])
def test_other_classes_are_refused(family):
    with default_dtype(torch.float32):
        model = getattr(tiny, family)()
    before = hooks_of(model)
    for methods in ((FASTV,), (HiPrune(r_max=0.5), FASTV)):
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            prune(model, *methods)
    assert hooks_of(model) == before


def test_text_alone_is_stocks(bundle, photos):
    text = bundle.inputs("USER: Hello ASSISTANT:", None)
    stock = bundle.logits(text), bundle.generate(text)
    with prune(bundle.model, FASTV):
        bundle.generate(bundle.ask(QUESTIONS[0], pictures=photos[:1]))
        assert torch.equal(bundle.logits(text), stock[0])
        assert torch.equal(bundle.generate(text), stock[1])


def test_text_alone_after_a_call_that_failed(bundle, photos):
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    text = bundle.inputs("USER: Hello ASSISTANT:", None)
    stock = bundle.generate(text)
    with prune(bundle.model, FASTV):
        with pytest.raises(ValueError, match="unheard_of") as held:
            bundle.model.generate(**inputs, unheard_of=1)
        assert torch.equal(bundle.generate(text), stock)
    assert held.tb is not None  # as notebooks do, which keep a failed call's tensors alive


def test_listeners_hear_of_a_prompt_once_it_has_run(bundle, photos):
    inputs, heard = bundle.ask(QUESTIONS[0], pictures=photos[:1]), []
    with prune(bundle.model, FIRST, FASTV) as pruned:
        pruned.on_record = heard.append
        with torch.no_grad():
            bundle.model.get_image_features(pixel_values=inputs["pixel_values"])
        assert not heard
        bundle.generate(inputs)
        bundle.logits(inputs)
    assert [len(reports) for reports in heard] == [1, 1]
    (report,) = heard[0]
    assert report.layer_tokens[0] == report.kept_tokens == report.stock_tokens // 2
    assert report.average_tokens == sum(report.layer_tokens) / DEPTH
    assert "averaged over layers" in repr(report)


def test_a_copy_prunes_by_itself(bundle, photos):
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    with prune(bundle.model, FASTV):
        expected, copied = bundle.logits(inputs), bundle.own()
    stock = bundle.logits(inputs)
    assert torch.equal(copied.logits(inputs), expected)
    assert expected.shape != stock.shape
    unprune(copied.model)
    assert torch.equal(copied.logits(inputs), stock)


def test_a_saved_and_loaded_model_prunes(pair, photos):
    theirs = pair()[1]
    bundle, file = open_hf(theirs.path), io.BytesIO()
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    prune(bundle.model, METHODS[3])
    torch.save(bundle.model, file)
    file.seek(0)
    loaded = copy.copy(bundle)
    loaded.model = torch.load(file, weights_only=False)
    assert torch.equal(loaded.logits(inputs), bundle.logits(inputs))
    assert (
        loaded.model.llava_hvp.last[0].layer_tokens[-1] < loaded.model.llava_hvp.last[0].kept_tokens
    )


def test_compiled(pair, photos):
    bundle = pair()[0].own()
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    with prune(bundle.model, METHODS[1]) as pruned, torch.no_grad():
        expected, ids = bundle.logits(inputs), bundle.generate(inputs)
        layers = pruned.last[0].layer_tokens
        torch._dynamo.reset()
        bundle.model = torch.compile(bundle.model, backend="eager")
        assert torch.equal(bundle.logits(inputs), expected)
        assert torch.equal(bundle.generate(inputs), ids)
        assert pruned.last[0].layer_tokens == layers


def test_an_adapter_on_the_queries_counts(bundle, photos):
    peft = pytest.importorskip("peft")
    own = bundle.own()
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    own.model = peft.get_peft_model(own.model, config).double()
    merged = own.own()
    merged.model = merged.model.merge_and_unload()
    inputs = bundle.ask(QUESTIONS[0], pictures=photos[:1])
    with prune(own.model, FASTV), prune(merged.model, FASTV), prune(bundle.model, FASTV):
        found, expected, plain = (b.logits(inputs) for b in (own, merged, bundle))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain)


class TestRefusedCalls:
    """What cannot be right is an error in a line, and prunes nothing silently."""

    @pytest.fixture
    def inputs(self, bundle, photos):
        with prune(bundle.model, FASTV):
            yield bundle.ask(*QUESTIONS, pictures=photos[:2])

    def refused(self, call, words, **kwargs):
        with pytest.raises(LlavaHvpError, match=words) as caught:
            call(**kwargs)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_labels(self, mode, bundle, inputs):
        getattr(bundle.model, mode)()
        try:
            self.refused(bundle.model, "labels", **inputs, labels=inputs["input_ids"])
        finally:
            bundle.model.eval()

    def test_training_mode(self, bundle, inputs):
        bundle.model.train()
        try:
            self.refused(bundle.model, r"call model.eval\(\)", **inputs)
            expected = bundle.generate(inputs)  # without gradients
        finally:
            bundle.model.eval()
        assert torch.equal(bundle.generate(inputs), expected)

    @pytest.mark.parametrize("way", ["__call__", "generate"])
    def test_padding_on_the_right(self, way, bundle, photos, inputs):
        right = bundle.ask(*QUESTIONS, pictures=photos[:2], side="right")
        self.refused(getattr(bundle.model, way), "padding_side = 'left'", **right)

    def test_an_image_that_the_mask_hides(self, bundle, inputs):
        token = bundle.model.config.image_token_id
        first = int((inputs["input_ids"] == token).nonzero()[:, 1].max())
        hidden = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
        hidden["attention_mask"][:, :first] = 0
        self.refused(bundle.model, "leaves tokens of an image out", **hidden)

    def test_a_static_cache(self, bundle, inputs):
        given = {"cache_implementation": "static", "max_new_tokens": 3}
        self.refused(bundle.model.generate, "StaticCache", **inputs, **given)

    @pytest.mark.parametrize("given", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 8}])
    def test_several_tokens_at_once(self, given, bundle, inputs):
        self.refused(bundle.model.generate, next(iter(given)), **inputs, **given)

    def test_another_turn_on_a_used_cache(self, bundle, inputs):
        given = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)

        def conversation(ids):
            mask = torch.ones_like(ids)
            mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
            return {**inputs, "input_ids": ids, "attention_mask": mask}

        # One more token is decoding; it is what generate would have made next.
        whole = bundle.generate(inputs, tokens=5)
        one_more = bundle.model.generate(
            **conversation(first.sequences),
            do_sample=False,
            max_new_tokens=1,
            suppress_tokens=[bundle.model.generation_config.eos_token_id],
            past_key_values=first.past_key_values,
        )
        assert torch.equal(one_more[:, -5:], whole)
        first = bundle.model.generate(**inputs, **given, return_dict_in_generate=True)
        turn = {**given, "past_key_values": first.past_key_values}
        longer = conversation(torch.cat((first.sequences, first.sequences[:, -3:]), 1))
        self.refused(bundle.model.generate, "at once", **longer, **turn)

    def test_an_image_on_the_cache_of_a_text(self, bundle, photos, inputs):
        one = bundle.ask(QUESTIONS[0], pictures=photos[:1])
        with torch.no_grad():
            text = bundle.inputs("USER: Hello ASSISTANT:", None)
            cache = bundle.model(**text, use_cache=True).past_key_values
        mask = torch.cat((torch.ones_like(text["input_ids"]), one["attention_mask"]), 1)
        given = {**one, "attention_mask": mask, "past_key_values": cache}
        self.refused(bundle.model, "a new cache", **given)
        given["input_ids"] = torch.cat((text["input_ids"], one["input_ids"]), 1)
        self.refused(bundle.model.generate, "a new cache|an empty cache", **given)

    def test_a_cache_that_was_cut(self, bundle, inputs):
        with torch.no_grad():
            cache = bundle.model(**inputs).past_key_values
            cache.crop(-1)
        self.refused(
            bundle.model, r"cut|cropped", input_ids=torch.tensor([[5], [5]]), past_key_values=cache
        )

    def test_a_window_shorter_than_the_prompt(self, pair, photos):
        bundle = pair(KINDS[1])[0]
        one = bundle.ask(QUESTIONS[0], pictures=photos[:1])
        config = bundle.model.model.language_model.config
        with prune(bundle.model, FASTV):
            before, config.sliding_window = config.sliding_window, 50
            try:
                self.refused(bundle.model, "sliding window of 50", **one)
            finally:
                config.sliding_window = before
