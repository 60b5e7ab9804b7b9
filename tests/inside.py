"""What the tests of methods inside the language model share: models, prompts, slow answers."""

import contextlib

import pytest
import torch
from conftest import Bundle, load
from reference_inside import Rule, SlowLlama, corrected, merged, raters

from llava_hvp import FastV, PyramidDrop, SparseVLM, prune
from llava_hvp.testing import make_checkpoint

DEPTH, EOS, TOKENS = 8, 2, 5
# name -> how to make it: two sizes of image, two kinds of keys, attention without sdpa, and a
# rotary table that is shorter than the prompt.
KINDS = {
    "llava-1.5-llama-deep": {"version": "1.5"},
    "llava-1.5-llama-eager": {"version": "1.5"},
    "llava-1.5-llama-short": {"version": "1.5", "max_position_embeddings": 100},
    "llava-1.5-mistral-deep": {"version": "1.5", "language": "mistral"},
    "llava-next-llama-deep": {"version": "next"},
    "llava-next-mistral-deep": {"version": "next", "language": "mistral"},
}
QUESTIONS = ("What is this?", "Is there a cat in this picture, and if so, what does it look at?")


@contextlib.contextmanager
def default_dtype(dtype):
    """Old transformers makes masks of the default dtype, which must hold float64's smallest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Double(Bundle):
    """In float64, so that what differs is no rounding."""

    def pixels(self, *images):
        pixels = super().pixels(*images)
        return [p.double() for p in pixels] if isinstance(pixels, list) else pixels.double()


def open_deep(folder, tower, name):
    """A Bundle of a model of DEPTH layers, in float64."""
    with default_dtype(torch.float32):
        make_checkpoint(folder / name, vision_tower=tower, layers=DEPTH, **KINDS[name])
    return open_double(folder / name)


def open_double(path):
    """The Bundle of a checkpoint, in float64."""
    name = path.name
    with default_dtype(torch.float32):
        loaded = load(path, **({"attn_implementation": "eager"} if "eager" in name else {}))
        if "eager" in name:
            assert loaded.model.model.config._attn_implementation == "eager"
        for layer in loaded.model.model.layers:
            rotary = getattr(layer.self_attn, "rotary_emb", None)
            if rotary is not None:  # old releases load its table in float16
                rotary._set_cos_sin_cache(rotary.max_seq_len_cached, "cpu", torch.float32)
    return Double(path, loaded.tokenizer, loaded.model.double(), loaded.processor)


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


def generated(bundle, questions, images, count=TOKENS, unused=(), **kwargs):
    """(ids of each row, logits of each row), greedily; `images` holds those of each row."""
    rows = [bundle.ids(q, len(own))[0] for q, own in zip(questions, images, strict=True)]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    every = [image for own in images for image in own or unused]
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
