"""`Checkpoint.pruned_by`: a method for a while, by the one way that every command takes."""

import pytest
import torch

from llava_hvp import HIVTP, get_method
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.encoder.text import ClipText
from llava_hvp.runtime import PruningConfig


@pytest.fixture
def viewer(checkpoints):
    return Viewer.load(str(checkpoints("llava-1.5-llama")), None, "cpu", bits=None)


@pytest.mark.parametrize("by", [HIVTP(r_max=0.25), Variant(PruningConfig(HIVTP(r_max=0.25)))])
def test_the_model_is_pruned_in_the_block_and_as_before_after_it(checkpoints, by):
    opened = open_checkpoint(str(checkpoints("llava-1.5-llama")), "cpu")
    before = dict(vars(opened.model))
    with opened.pruned_by(by) as pruning:
        assert pruning.method == HIVTP(r_max=0.25)
        assert opened.model.llava_hvp is pruning
    assert vars(opened.model) == before
    with pytest.raises(RuntimeError, match="inside"), opened.pruned_by(by):
        raise RuntimeError("inside")
    assert vars(opened.model) == before


@pytest.mark.parametrize("by", [None, Variant()])
def test_by_none_the_model_is_left_alone(checkpoints, by):
    opened = open_checkpoint(str(checkpoints("llava-1.5-llama")), "cpu")
    with opened.pruned_by(by) as pruning:
        assert pruning is None
        assert "llava_hvp" not in vars(opened.model)


def test_the_text_encoder_is_loaded_once_and_read_where_it_is_asked_for(
    viewer, photos, monkeypatch
):
    loads, load = [], ClipText.load
    monkeypatch.setattr(ClipText, "load", lambda name: loads.append(name) or load(name))
    ids = viewer.prompt("Is there a cat?")
    clip, llm = (get_method("hiprune++", r_max=0.6, alpha=0.1, text=t) for t in ("clip", "llm"))
    by_llm = viewer.look(llm, photos[3], ids).selection.keep
    assert not loads
    by_clip = viewer.look(clip, photos[3], ids).selection.keep
    assert torch.equal(viewer.look(clip, photos[3], ids).selection.keep, by_clip)
    assert len(loads) == 1
    assert not torch.equal(by_llm, by_clip)
    # The encoder is there now, and this method does not read it.
    assert torch.equal(viewer.look(llm, photos[3], ids).selection.keep, by_llm)


def test_a_text_encoder_that_a_config_names_is_its_own(checkpoints, monkeypatch):
    loads, load = [], ClipText.load
    monkeypatch.setattr(ClipText, "load", lambda name: loads.append(name) or load(name))
    opened = open_checkpoint(str(checkpoints("llava-1.5-llama")), "cpu")
    other = str(checkpoints("llava-1.5-llama").parent / "clip-112")
    named, default = (PruningConfig.of("cdpruner", **o) for o in ({"clip_text": other}, {}))
    encoders = []
    for by in (named, default, named, default):
        with opened.pruned_by(by) as pruning:
            encoders.append(pruning.clip_text)
    assert len(loads) == 2
    assert loads[0] == other
    assert encoders[0] is encoders[2] is not encoders[1] is encoders[3]
