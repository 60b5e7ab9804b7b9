"""A method inside the language model, put on and taken off: what it reports and refuses."""

import copy
import io

import pytest
import torch
from inside import (
    DEPTH,
    QUESTIONS,
    RULES,
    assert_equal,
    each_rule,
    expected,
    generated,
    open_double,
    prompt_of,
)
from reference_inside import SlowLlama

from llava_hvp import HIVTP, FastV, PyramidDrop, SparseVLM, prune, unprune
from llava_hvp.errors import (
    DecodingError,
    LayerError,
    OptionError,
    PrunedStateError,
    UnsupportedModelError,
)
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.compat import transformers_version

pytestmark = pytest.mark.usefixtures("double")


def hooks_of(model):
    """Everything that hooks, and what an instance has of its own."""
    return [
        (
            sorted(vars(module)),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            list(module._forward_hooks_with_kwargs),
            list(module._forward_pre_hooks_with_kwargs),
            list(module._forward_hooks_always_called),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind", [FastV, PyramidDrop, SparseVLM])
def test_a_budget_of_all_is_stock_bit_for_bit(deep, photos, kind):
    bundle = deep()
    stock = generated(bundle, QUESTIONS[:1], [photos[:1]])
    with prune(bundle.model, kind(r_max=1)) as pruned:
        found = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert found[0] == stock[0]
    assert torch.equal(found[1], stock[1])
    report = pruned.last[0]
    assert report.layer_tokens == (report.stock_tokens,) * DEPTH
    assert all(torch.equal(stage, report.sent) for stage in report.stages)


@pytest.mark.parametrize("together", [True, False])
def test_unprune_gives_the_model_back(deep, photos, together):
    bundle = deep()
    before, stock = hooks_of(bundle.model), generated(bundle, QUESTIONS[:1], [photos[:1]])
    methods = (HIVTP(r_max=0.5), FastV(r_max=0.5)) if together else (SparseVLM(r_max=0.5),)
    prune(bundle.model, *methods)
    assert hooks_of(bundle.model) != before
    pruned = generated(bundle, QUESTIONS[:1], [photos[:1]])
    unprune(bundle.model)
    assert hooks_of(bundle.model) == before
    found = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert torch.equal(found[1], stock[1])
    assert not torch.equal(pruned[1], stock[1])


@each_rule
def test_the_report_has_the_patches_of_each_stage(deep, photos, method, slowly):
    bundle = deep()
    embeds, visual = prompt_of(bundle, QUESTIONS[0], photos[:1])
    count = int(visual.sum())
    trace = SlowLlama(bundle.model)(embeds, visual, slowly(method)(count))
    start = visual.tolist().index(True)
    with prune(bundle.model, method) as pruned:
        generated(bundle, QUESTIONS[:1], [photos[:1]])
    (report,) = pruned.last
    assert list(report.layer_tokens) == trace.entering
    assert report.average_tokens == pytest.approx(method.average(count, DEPTH))
    assert report.average_tokens <= 0.5 * count
    assert len(report.stages) == len(trace.stages) == len(method.stages(DEPTH))
    for mask, columns in zip(report.stages, trace.stages.values(), strict=True):
        assert mask.shape == (1, count)
        patches = [column - start for column in columns if column is not None]
        assert mask[0].nonzero().flatten().tolist() == patches


@pytest.mark.parametrize("method", [rule[0] for rule in RULES], ids=lambda m: m.name)
def test_of_several_images_each_has_its_own_report(deep, photos, method):
    bundle = deep()
    with prune(bundle.model, method) as pruned:
        generated(bundle, QUESTIONS, [photos[:2], photos[2:3]])
    assert [report.size for report in pruned.last] == [photo.size for photo in photos[:3]]
    first, second, third = (report.layer_tokens for report in pruned.last)
    stock = pruned.last[0].stock_tokens
    together = [a + b for a, b in zip(first, second, strict=True)]
    counts = method.counts(2 * stock, DEPTH, 2)
    layers = [0, *(stage.layer for stage in method.stages(DEPTH))]
    assert [together[layer] for layer in layers] == [2 * stock, *counts]
    assert [third[layer] for layer in layers] == [stock, *method.counts(stock, DEPTH)]
    for report in pruned.last:
        for stage, layer in zip(report.stages, layers[1:], strict=True):
            assert int(stage.sum()) <= report.layer_tokens[layer]


def test_newlines_count_as_tokens_and_stand_at_no_patch(deep, photos):
    bundle, method = deep("llava-next-llama-deep"), FastV(r_max=0.6)
    with prune(bundle.model, method) as pruned:
        generated(bundle, QUESTIONS[:1], [photos[:1]])
    (report,) = pruned.last
    (mask,) = report.stages
    assert mask.shape == report.sent.shape == (report.tiles, 64)
    assert not (mask & ~report.sent).any()
    assert report.layer_tokens[0] == report.stock_tokens == report.kept_tokens
    assert 0 < int(mask.sum()) <= report.layer_tokens[-1]


def test_listeners_hear_of_a_prompt_once_it_has_run(deep, photos):
    bundle, heard = deep(), []
    with prune(bundle.model, HIVTP(r_max=0.5), FastV(r_max=0.5)) as pruned:
        pruned.on_record = heard.append
        ids, pixels = bundle.ids(QUESTIONS[0]), bundle.pixels(photos[0])
        embeds, *_ = bundle.embeds(ids, pixels, [photos[0].size])
        assert not heard
        bundle.model.encode_images(pixels)
        assert not heard
        with torch.no_grad():
            bundle.model(inputs_embeds=embeds)
        assert len(heard) == 1
        generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert len(heard) == 2
    (report,) = heard[1]
    assert report.layer_tokens[0] == 32
    assert report.average_tokens == sum(report.layer_tokens) / DEPTH <= 16


def test_what_a_budget_keeps_is_searched_once_for_prompts_alike(deep, photos, monkeypatch):
    bundle, searched, keeps = deep(), [], PyramidDrop.keeps

    def spy(method, visual, depth, images=1):
        searched.append((visual, images))
        return keeps(method, visual, depth, images)

    with prune(bundle.model, PyramidDrop(r_max=0.5)) as pruned:
        monkeypatch.setattr(PyramidDrop, "keeps", spy)
        for images in (1, 2, 1):
            generated(bundle, QUESTIONS[:1], [photos[:images]])
            assert pruned.last[0].layer_tokens[-1] < 64
    assert searched == [(64, 1), (128, 2)]


def test_a_copy_prunes_by_itself(deep, photos):
    bundle = deep()
    with prune(bundle.model, FastV(r_max=0.4)):
        wanted = generated(bundle, QUESTIONS[:1], [photos[:1]])
        copied = copy.deepcopy(bundle.model)
    stock = generated(bundle, QUESTIONS[:1], [photos[:1]])
    other = type(bundle)(bundle.path, bundle.tokenizer, copied, bundle.processor)
    found = generated(other, QUESTIONS[:1], [photos[:1]])
    assert torch.equal(found[1], wanted[1])
    assert copied.llava_hvp.last[0].layer_tokens[-1] < copied.llava_hvp.last[0].layer_tokens[0]
    unprune(copied)
    assert hooks_of(copied) == hooks_of(bundle.model)
    assert torch.equal(generated(other, QUESTIONS[:1], [photos[:1]])[1], stock[1])


def test_a_saved_and_loaded_model_prunes(deep, photos):
    bundle, file = deep(), io.BytesIO()
    with prune(bundle.model, SparseVLM(r_max=0.4)):
        wanted = generated(bundle, QUESTIONS[:1], [photos[:1]])
    # One that never ran: transformers 5 hooks a model that did, by what cannot be pickled.
    fresh = open_double(bundle.path).model
    prune(fresh, SparseVLM(r_max=0.4))
    torch.save(fresh, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    other = type(bundle)(bundle.path, bundle.tokenizer, model, bundle.processor)
    assert torch.equal(generated(other, QUESTIONS[:1], [photos[:1]])[1], wanted[1])
    unprune(model)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_an_installed_method_is_in_every_model_that_is_loaded(deep, photos):
    bundle = deep()
    with prune(bundle.model, HIVTP(r_max=0.5), PyramidDrop(r_max=0.5)):
        wanted = generated(bundle, QUESTIONS[:1], [photos[:1]])
    builder.install(HIVTP(r_max=0.5), PyramidDrop(r_max=0.5))
    try:
        other = open_double(bundle.path)
    finally:
        builder.uninstall()
    assert torch.equal(generated(other, QUESTIONS[:1], [photos[:1]])[1], wanted[1])
    assert other.model.llava_hvp.inside == PyramidDrop(r_max=0.5)


@pytest.mark.parametrize("first", ["prune", "adapter"])
def test_an_adapter_on_the_queries_counts(deep, photos, first):
    peft = pytest.importorskip("peft")
    bundle, method = deep(), FastV(r_max=0.4)
    model = copy.deepcopy(bundle.model)
    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False, lora_alpha=16
    )
    torch.manual_seed(0)
    if first == "prune":
        prune(model, method)
        wrapped = peft.get_peft_model(model, config).double()
    else:
        wrapped = peft.get_peft_model(model, config).double()
        prune(wrapped, method)
    other = type(bundle)(bundle.path, bundle.tokenizer, wrapped, bundle.processor)
    merged = copy.deepcopy(wrapped)
    unprune(merged)
    merged = type(bundle)(
        bundle.path, bundle.tokenizer, merged.merge_and_unload(), bundle.processor
    )
    wanted = expected(merged, QUESTIONS[0], photos[:1], method, RULES[0][1])
    ids, logits = generated(other, QUESTIONS[:1], [photos[:1]])
    assert_equal((ids[0], logits[0]), wanted)
    plain = expected(bundle, QUESTIONS[0], photos[:1], method, RULES[0][1])
    assert not torch.equal(wanted[1], plain[1])


REFUSED = [
    (FastV(r_max=0.05), "see"),
    (FastV(layer=DEPTH), f"layer {DEPTH} of a language model of {DEPTH}: give 1 to {DEPTH - 1}"),
    (PyramidDrop(layers=(1, 99)), "layer 99"),
    (SparseVLM(r_max=0.1), "see all tokens"),
]


@pytest.mark.parametrize(("method", "words"), REFUSED, ids=str)
def test_what_the_depth_does_not_allow_leaves_the_model_as_it_was(deep, method, words):
    bundle = deep()
    before = hooks_of(bundle.model)
    with pytest.raises((OptionError, LayerError), match=words):
        prune(bundle.model, method)
    assert hooks_of(bundle.model) == before


def test_two_methods_inside_are_refused(deep):
    with pytest.raises(OptionError, match="both prune inside"):
        prune(deep().model, FastV(), SparseVLM())


def test_a_budget_in_tokens_below_the_floor_says_the_least(deep, photos):
    bundle = deep()
    with (
        prune(bundle.model, FastV(num_tokens=8)),
        pytest.raises(OptionError, match="give 9 or more"),
    ):
        generated(bundle, QUESTIONS[:1], [photos[:1]])
    with prune(bundle.model, FastV(num_tokens=9)) as pruned:
        generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert pruned.last[0].average_tokens <= 9


class TestRefusedCalls:
    """What cannot be followed is an error and prunes nothing silently."""

    @pytest.fixture
    def pruned(self, deep):
        bundle = deep()
        with prune(bundle.model, FastV(r_max=0.4)):
            yield bundle

    def call(self, bundle, photo, **kwargs):
        return bundle.model.generate(
            bundle.ids(QUESTIONS[0]),
            images=bundle.pixels(photo),
            image_sizes=[photo.size],
            **{"do_sample": False, "max_new_tokens": 3, **kwargs},
        )

    def forward(self, bundle, photo, **kwargs):
        with torch.no_grad():
            return bundle.model(
                bundle.ids(QUESTIONS[0]),
                images=bundle.pixels(photo),
                image_sizes=[photo.size],
                **kwargs,
            )

    def test_labels(self, pruned, photos):
        with pytest.raises(DecodingError, match="labels"):
            self.forward(pruned, photos[0], labels=pruned.ids(QUESTIONS[0]))

    def test_a_static_cache(self, pruned, photos):
        cache_utils = pytest.importorskip("transformers.cache_utils")
        if not hasattr(cache_utils, "StaticCache"):
            pytest.skip("this transformers has none")
        with pytest.raises(DecodingError, match="StaticCache"):
            self.call(pruned, photos[0], cache_implementation="static")

    def test_another_turn_on_a_used_cache(self, pruned, photos):
        cache = self.forward(pruned, photos[0]).past_key_values
        with pytest.raises(DecodingError, match="tokens at once"):
            self.forward(pruned, photos[1], past_key_values=cache)
        with pytest.raises(DecodingError, match="tokens at once"), torch.no_grad():
            pruned.model(pruned.ids(QUESTIONS[1], 0), past_key_values=cache)

    def test_a_prompt_on_the_cache_of_a_text(self, pruned, photos):
        with torch.no_grad():
            cache = pruned.model(pruned.ids(QUESTIONS[1], 0), use_cache=True).past_key_values
        with pytest.raises((DecodingError, AttributeError), match=r"cache|get_seq_length"):
            self.forward(pruned, photos[0], past_key_values=cache)

    def test_a_cache_that_was_cut(self, pruned, photos):
        cache = self.forward(pruned, photos[0]).past_key_values
        if not hasattr(cache, "crop"):
            pytest.skip("this transformers cuts none")
        try:
            cache.crop(20)
        except ValueError:  # a number to take off, in newer releases
            cache.crop(-3)
        with pytest.raises(DecodingError, match="cut"), torch.no_grad():
            pruned.model(torch.tensor([[5]]), past_key_values=cache)

    def test_assisted_decoding(self, pruned, photos):
        if transformers_version() < (5, 0):
            pytest.skip("fails on embeddings by itself, pruned or not")
        with pytest.raises(DecodingError, match="tokens at once"):
            self.call(pruned, photos[0], prompt_lookup_num_tokens=2, max_new_tokens=80)

    def test_embeddings_that_something_changes_on_the_way(self, pruned, photos):
        ids, pixels = pruned.ids(QUESTIONS[0]), pruned.pixels(photos[0])
        embeds, *_ = pruned.embeds(ids, pixels, [photos[0].size])
        with pytest.raises(DecodingError, match="not those of the prompt"), torch.no_grad():
            pruned.model(inputs_embeds=torch.cat((embeds[:, :3], embeds), dim=1))

    def test_a_window_shorter_than_the_prompt(self, deep, photos):
        bundle = deep("llava-1.5-mistral-deep")
        config = bundle.model.get_model().config
        with prune(bundle.model, FastV(r_max=0.4)):
            config.sliding_window = 50
            try:
                with pytest.raises(DecodingError, match="sliding window of 50"):
                    self.forward(bundle, photos[0])
                config.sliding_window = 4096
                self.forward(bundle, photos[0])
            finally:
                config.sliding_window = None

    def test_an_attention_that_takes_no_mask(self, deep):
        bundle = deep()
        config = bundle.model.get_model().config
        before, config._attn_implementation = config._attn_implementation, "flex_attention"
        try:
            with pytest.raises(UnsupportedModelError, match="flex_attention"):
                prune(bundle.model, FastV(r_max=0.4))
        finally:
            config._attn_implementation = before

    def test_a_model_that_is_pruned_already(self, pruned):
        with pytest.raises(PrunedStateError):
            prune(pruned.model, FastV(r_max=0.4))
