"""The same weights, pixels and questions in both hosts: the same patches, the same answers."""

import pytest
import torch
from hf_models import KINDS, QUESTIONS, as_llavas, needs_release, sized

from llava_hvp import (
    HiRED,
    PruMerge,
    PruMergePlus,
    Runtime,
    VisionMethod,
    VisionZip,
    get_method,
    list_methods,
    prune,
)

pytestmark = needs_release

OWN = [
    n for n in list_methods(VisionMethod) if type(get_method(n)).__module__.startswith("llava_hvp.")
]
VARIANTS = {name: get_method(name, r_max=0.25) for name in OWN} | {
    "hired paper": HiRED(num_tokens=60, variant="paper"),
    "hiprune++ llm": get_method("hiprune++", r_max=0.25, text="llm"),
    "fopru logits": get_method("fopru", r_max=0.25, attention="logits"),
    "divprune image": get_method("divprune", r_max=0.25, scope="image"),
    "prumerge adaptive": PruMerge(adaptive=True),
    "prumerge+ adaptive": PruMergePlus(adaptive=True),
    "visionzip spatial": VisionZip(num_tokens=60),
    "hivtp all newlines": get_method("hivtp", r_max=0.25),
    "hivtp no newlines": get_method("hivtp", r_max=0.25),
}
RUNTIMES = {
    "visionzip spatial": Runtime(patch_merge="spatial"),
    "hivtp all newlines": Runtime(newline="all"),
    "hivtp no newlines": Runtime(newline="none"),
}


@pytest.fixture(scope="module")
def pair(loaded, hf, photos):
    """A function from a kind to both models, with one batch in the form of each."""

    def get(kind):
        ours, theirs = hf(kind), loaded(kind)
        inputs = ours.ask(*QUESTIONS, pictures=sized(photos))
        return ours, inputs, theirs, as_llavas(ours, inputs)

    return get


@pytest.mark.parametrize("name", ["unpruned", *VARIANTS])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_greedy_ids_are_those_of_llavas_host(kind, name, pair, checkpoints):
    ours, inputs, theirs, (ids, mask, pixels, sizes) = pair(kind)
    if name == "unpruned":
        # Row by row: stock LLaVA pads a ragged batch on the right, and generates after it.
        alone = [
            theirs.generate(row[real][None], [stack] if ours.is_next else stack[None], [size], 8)[0]
            for row, real, stack, size in zip(ids, mask, pixels, sizes, strict=True)
        ]
        assert torch.equal(ours.generate(inputs, tokens=8), torch.stack(alone))
        return
    method, runtime = VARIANTS[name], RUNTIMES.get(name)
    clip = checkpoints(kind).parent / "clip-112"
    with prune(theirs.model, method, runtime=runtime) as reference:
        expected = theirs.generate(ids, pixels, sizes, tokens=8, attention_mask=mask)
    with prune(ours.model, method, runtime=runtime, clip_text=clip) as pruned:
        found = ours.generate(inputs, tokens=8)
    assert len(pruned.last) == len(reference.last) == 3
    for a, b in zip(pruned.last, reference.last, strict=True):
        assert torch.equal(a.selection.keep, b.selection.keep)
        assert torch.equal(a.sent, b.sent)
        assert (a.kept_tokens, a.stock_tokens) == (b.kept_tokens, b.stock_tokens)
        assert 0 < a.kept_tokens < a.stock_tokens
        assert a.size == b.size or not ours.is_next
    assert torch.equal(found, expected)
