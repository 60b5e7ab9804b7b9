"""Methods inside a language model of 4 and 8 bits, by the real bitsandbytes."""

import pytest
import torch
from conftest import Bundle
from inside import DEPTH

from llava_hvp import HIVTP, FastV, PyramidDrop, SparseVLM, prune
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.compat.versions import transformers_version
from llava_hvp.testing import make_checkpoint

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.skipif(
        transformers_version() < (4, 46),
        reason="this transformers refuses to quantise without a GPU",
    ),
    pytest.mark.usefixtures("units"),
]
METHODS = [FastV(r_max=0.4), PyramidDrop(r_max=0.4), SparseVLM(r_max=0.4)]


def loaded(path, **kwargs):
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), None, path.name, device="cpu", device_map="cpu", **kwargs
    )
    return Bundle(path, tokenizer, model, processor)


@pytest.fixture(scope="module")
def deep_path(checkpoints, tmp_path_factory):
    tower = checkpoints("llava-1.5-llama").parent / "clip-112"
    folder = tmp_path_factory.mktemp("quantised") / "llava-1.5-deep"
    return make_checkpoint(folder, vision_tower=tower, layers=DEPTH)


def answer(bundle, photo):
    return bundle.generate(bundle.ids("What is this?"), bundle.pixels(photo).half(), [photo.size])


@pytest.mark.parametrize("bits", ["load_4bit", "load_8bit"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_installed_before_a_quantised_load(deep_path, photos, method, bits):
    """Loading replaces the projections that were there when the hooks were put on."""
    builder.install(method)
    try:
        bundle = loaded(deep_path, **{bits: True})
    finally:
        builder.uninstall()
    ids = answer(bundle, photos[0])
    (report,) = bundle.model.llava_hvp.last
    count = report.stock_tokens
    assert report.average_tokens == pytest.approx(method.average(count, DEPTH))
    assert report.layer_tokens[-1] < count
    wrapped = loaded(deep_path, **{bits: True})
    with prune(wrapped.model, method):
        assert torch.equal(answer(wrapped, photos[0]), ids)
        again = wrapped.model.llava_hvp.last[0]
    assert all(torch.equal(a, b) for a, b in zip(report.stages, again.stages, strict=True))


def test_scores_of_a_quantised_layer_are_those_of_its_attention(deep_path, photos):
    """The choice is that of the weights which eager attention hands out."""
    eager = loaded(deep_path, load_4bit=True, attn_implementation="eager")
    ids, pixels = eager.ids("What is this?"), eager.pixels(photos[0]).half()
    with torch.no_grad():
        output = eager.model(
            ids, images=pixels, image_sizes=[photos[0].size], output_attentions=True
        )
    method = FastV(layer=2, ratio=0.25)
    first = ids[0].tolist().index(-200)
    row = output.attentions[1][0, :, -1].float().mean(0)[first : first + 64]
    with prune(eager.model, method) as pruned:
        answer(eager, photos[0])
    (mask,) = pruned.last[0].stages
    wanted = row.argsort(descending=True, stable=True)[:16]
    # float16 attention ties where float32 does not: the least of those kept may differ.
    found = set(mask[0].nonzero().flatten().tolist())
    assert len(found & set(wanted.tolist())) >= 15


def test_after_a_method_at_the_tower(deep_path, photos):
    bundle = loaded(deep_path, load_4bit=True)
    with prune(bundle.model, HIVTP(r_max=0.5), FastV(r_max=0.5)) as pruned:
        answer(bundle, photos[0])
    (report,) = pruned.last
    assert report.layer_tokens[0] == report.kept_tokens == 32
    assert report.average_tokens <= 16
