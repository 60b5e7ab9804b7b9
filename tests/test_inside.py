"""A method inside the language model of stock LLaVA: equal to one that masks, slowly."""

import pytest
import torch
from conftest import Bundle, load
from reference_inside import Rule, SlowLlama, corrected, merged, raters

from llava_hvp import HIVTP, FastV, PyramidDrop, SparseVLM, prune
from llava_hvp.testing import make_checkpoint

DEPTH, EOS, TOKENS = 8, 2, 5
# name -> how to make it: two sizes of image, two kinds of keys.
KINDS = {
    "llava-1.5-llama-deep": {"version": "1.5"},
    "llava-1.5-mistral-deep": {"version": "1.5", "language": "mistral"},
    "llava-next-llama-deep": {"version": "next"},
    "llava-next-mistral-deep": {"version": "next", "language": "mistral"},
}
QUESTIONS = ("What is this?", "Is there a cat in this picture, and if so, what does it look at?")


@pytest.fixture(autouse=True)
def _double():
    """Old transformers makes masks of the default dtype, which must hold float64's smallest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Double(Bundle):
    """In float64, so that what differs is no rounding."""

    def pixels(self, *images):
        pixels = super().pixels(*images)
        return [p.double() for p in pixels] if isinstance(pixels, list) else pixels.double()


@pytest.fixture(scope="module")
def deep(tmp_path_factory, checkpoints):
    """A function from a name of KINDS to a Bundle; every test leaves it unpruned."""
    root, bundles = tmp_path_factory.mktemp("deep"), {}
    tower = checkpoints("llava-1.5-llama").parent / "clip-112"

    def get(name="llava-1.5-llama-deep"):
        if name not in bundles:
            torch.set_default_dtype(torch.float32)
            path = make_checkpoint(root / name, vision_tower=tower, layers=DEPTH, **KINDS[name])
            loaded = load(path)
            torch.set_default_dtype(torch.float64)
            for layer in loaded.model.model.layers:
                rotary = getattr(layer.self_attn, "rotary_emb", None)
                if rotary is not None:  # old releases load its table in float16
                    rotary._set_cos_sin_cache(4096, "cpu", torch.float32)
            bundles[name] = Double(path, loaded.tokenizer, loaded.model.double(), loaded.processor)
        assert "llava_hvp" not in vars(bundles[name].model), "a test left its pruning on"
        return bundles[name]

    return get


def prompt_of(bundle, question, images, method=None):
    """(embeddings (n, D), visual (n,)) of one row, as the vision method sends it."""
    ids = bundle.ids(question, len(images))
    pixels, sizes = bundle.pixels(*images), [image.size for image in images]
    if method is None:
        embeds = bundle.embeds(ids, pixels, sizes)[0][0]
    else:
        with prune(bundle.model, method):
            embeds = bundle.embeds(ids, pixels, sizes)[0][0]
    marks = (ids[0] == -200).nonzero().flatten().tolist()
    each = (len(embeds) - len(ids[0]) + len(marks)) // len(marks)
    visual = []
    for number in range(len(ids[0])):
        visual += [True] * each if number in marks else [False]
    return embeds, torch.tensor(visual)


def fastv(method):
    return lambda visual: Rule(
        dict(zip(layers_of(method), method.keeps(visual, DEPTH), strict=True))
    )


def pyramiddrop(method):
    return lambda visual: Rule(
        dict(zip(layers_of(method), method.keeps(visual, DEPTH), strict=True)),
        renumbers=True,
        of="next",
    )


def sparsevlm(method):
    first = method.version == "1.5"
    return lambda visual: Rule(
        dict(zip(layers_of(method), method.keeps(visual, DEPTH), strict=True)),
        renumbers=first,
        rows=raters,
        score=None if first else corrected,
        merge=merged if first else None,
    )


def layers_of(method):
    return [stage.layer for stage in method.stages(DEPTH)]


RULES = [
    (FastV(r_max=0.4), fastv),
    (PyramidDrop(r_max=0.4), pyramiddrop),
    (PyramidDrop(), pyramiddrop),
    (SparseVLM(r_max=0.4), sparsevlm),
    (SparseVLM(version="2.0", r_max=0.5), sparsevlm),
]
each_rule = pytest.mark.parametrize(
    ("method", "slowly"),
    RULES,
    ids=["fastv", "pyramiddrop", "pyramiddrop-halves", "sparsevlm", "sparsevlm-2.0"],
)


def expected(bundle, question, images, method, slowly, count=TOKENS, before=None):
    embeds, visual = prompt_of(bundle, question, images, before)
    rule = slowly(method)(int(visual.sum()))
    return SlowLlama(bundle.model).generate(embeds, visual, rule, count, banned=[EOS])


def generated(bundle, questions, images, count=TOKENS, **kwargs):
    """(ids of each row, logits of each row), greedily; `images` holds those of each row."""
    rows = [bundle.ids(q, len(own))[0] for q, own in zip(questions, images, strict=True)]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    every = [image for own in images for image in own]
    found = bundle.model.generate(
        ids,
        images=bundle.pixels(*every) if every else None,
        image_sizes=[image.size for image in every],
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )
    return found.sequences[:, -count:].tolist(), torch.stack(found.scores, 1)


def assert_equal(found, wanted):
    ids, logits = wanted
    assert found[0] == ids
    finite = found[1].isfinite()
    torch.testing.assert_close(found[1].double()[finite], logits[finite], rtol=0, atol=1e-4)


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_one_row_is_as_if_masked(deep, photos, name, method, slowly):
    bundle = deep(name)
    wanted = expected(bundle, QUESTIONS[0], photos[:1], method, slowly)
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert_equal((ids[0], logits[0]), wanted)


@each_rule
def test_ragged_rows_are_each_as_if_alone(deep, photos, method, slowly):
    bundle = deep()
    wanted = [
        expected(bundle, q, photos[i : i + 1], method, slowly) for i, q in enumerate(QUESTIONS)
    ]
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS, [photos[:1], photos[1:2]])
    for row in range(2):
        assert_equal((ids[row], logits[row]), wanted[row])


@each_rule
def test_several_images_of_a_prompt_are_one_set(deep, photos, method, slowly):
    bundle = deep()
    wanted = expected(bundle, QUESTIONS[0], photos[:2], method, slowly)
    with prune(bundle.model, method):
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:2]])
    assert_equal((ids[0], logits[0]), wanted)


@each_rule
def test_after_a_method_at_the_tower(deep, photos, method, slowly):
    bundle, before = deep(), HIVTP(r_max=0.5)
    wanted = expected(bundle, QUESTIONS[0], photos[:1], method, slowly, before=before)
    with prune(bundle.model, before, method) as pruned:
        ids, logits = generated(bundle, QUESTIONS[:1], [photos[:1]])
    assert_equal((ids[0], logits[0]), wanted)
    report = pruned.last[0]
    assert report.kept_tokens == report.layer_tokens[0] == report.stock_tokens // 2
    assert report.layer_tokens[-1] < report.layer_tokens[0]
