"""LLaVA's form of a checkpoint and transformers': there and back, every weight the same."""

import json

import pytest
import torch
from conftest import KINDS
from hf_models import convert, load, needs_release
from safetensors.torch import load_file

from llava_hvp.checkpoints.convert import from_transformers, to_transformers
from llava_hvp.errors import OptionError
from llava_hvp.shapes.weights import CHECKPOINTS, checkpoint


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_shipped_checkpoints_there_and_back(name, tmp_path):
    source = checkpoint(tmp_path, name)
    there = to_transformers(source, tmp_path / "there")
    pairs = json.loads((there / "config.json").read_text()).get("image_grid_pinpoints")
    # (height, width) there, (width, height) here: the first, of which two tall tiles, is told so.
    assert pairs is None or pairs[0] == [336, 168]
    back = from_transformers(there, tmp_path / f"{name}-again")
    config = json.loads((back / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    expected, found = tensors(source), tensors(back)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    tower = {n: w for n, w in tensors(source / "vision-tower").items() if "vision_model" in n}
    again = tensors(back / "vision-tower")
    assert tower.keys() == again.keys()
    kind = expected["lm_head.weight"].dtype
    assert all(torch.equal(tower[n].to(kind), again[n]) for n in tower)
    same = ("architectures", "model_type", "vocab_size", "mm_patch_merge_type", "hidden_size")
    assert {n: config[n] for n in same} == {n: before[n] for n in same}
    assert config.get("image_grid_pinpoints") == before.get("image_grid_pinpoints")
    assert config["mm_vision_tower"] == str(back / "vision-tower")
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


@needs_release
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_transformers_saves_goes_back_too(name, tmp_path):
    from transformers import AutoTokenizer

    source = checkpoint(tmp_path, name)
    there = load(to_transformers(source, tmp_path / "there"), dtype=torch.float16)
    there.model.save_pretrained(tmp_path / "saved")
    there.processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(OptionError, match=r"no tokenizer\.model"):
        from_transformers(tmp_path / "saved", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model = (source / "tokenizer.model").read_bytes()
    (tmp_path / "saved" / "tokenizer.model").write_bytes(model)
    back = from_transformers(tmp_path / "saved", tmp_path / f"{name}-again")
    expected, found = tensors(source), tensors(back)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    text = "USER: What is this? ASSISTANT:"
    ids = [AutoTokenizer.from_pretrained(f, use_fast=False)(text).input_ids for f in (source, back)]
    assert ids[0] == ids[1]


@needs_release
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_both_forms_answer_alike(name, tmp_path, photos):
    from conftest import load as load_llava

    # Through its own loader, by the name that says what it is.
    source = checkpoint(tmp_path, name)
    ours = load(to_transformers(source, tmp_path / "there"))
    theirs = load_llava(from_transformers(ours.path, tmp_path / f"{name}-again"))
    picture = photos[1].resize((168, 168))
    inputs = ours.ask("Is there a circle?", pictures=[picture])
    ids = inputs["input_ids"][0]
    text = ids[ids != ours.model.config.image_token_id]
    first = int((ids == ours.model.config.image_token_id).nonzero()[0])
    marked = torch.cat((text[:first], torch.tensor([-200]), text[first:]))[None]
    pixels = inputs["pixel_values"]
    expected = theirs.generate(marked, pixels, [picture.size], tokens=6)
    assert torch.equal(ours.generate(inputs, tokens=6), expected)


@needs_release
@pytest.mark.parametrize("kind", [k for k in KINDS if "spatial" not in k and "336" not in k])
def test_no_weight_is_missing_or_left_over(kind, checkpoints):
    from transformers import AutoModelForImageTextToText

    source = checkpoints(kind)
    target = convert(source, source.with_name(f"{kind}-hf"))
    model, report = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    ids = AutoIds(target)
    assert ids("<image>") == [model.config.image_token_id]
    assert len(model.get_input_embeddings().weight) == model.config.image_token_id + 1


class AutoIds:
    """Ids of a text by a folder's tokenizer."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@needs_release
def test_the_tokenizers_agree(checkpoints):
    source = checkpoints("llava-1.5-llama")
    target = convert(source, source.with_name("llava-1.5-llama-hf"))
    for text in ("What is this?", "colour", "USER: Where is it? ASSISTANT:"):
        assert AutoIds(source)(text) == AutoIds(target)(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mpt"}, "no LLaVA checkpoint"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"mm_patch_merge_type": "spatial"}, "spatial_unpad"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "no folder here"),
    ],
)
def test_what_has_no_other_form_is_refused_before_anything_is_written(changes, words, tmp_path):
    source = checkpoint(tmp_path, CHECKPOINTS[0])
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(OptionError, match=words):
        to_transformers(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_target_with_something_in_it_is_left_alone(tmp_path):
    source = checkpoint(tmp_path, CHECKPOINTS[0])
    with pytest.raises(OptionError, match="new folder"):
        to_transformers(source, source)
    with pytest.raises(OptionError, match=r"no\s+LLaVA-1\.5"):
        from_transformers(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()
