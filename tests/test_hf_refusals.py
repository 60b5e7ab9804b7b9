"""transformers' own LLaVA: what a pruned call cannot do rightly is refused in a line."""

import pytest
import torch
from hf_models import KINDS, ask, needs_release, state

from llava_hvp import HIVTP, prune
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.versions import release

pytestmark = needs_release
METHOD = HIVTP(r_max=0.25)


def refused(given):
    """name -> (arguments of a forward pass or generate, words of the error)."""
    ids, mask = given["input_ids"], given["attention_mask"]
    square = torch.ones(2, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    embeds = torch.zeros(*ids.shape, 64)
    return {
        "4-D mask": ({"attention_mask": square}, "attention_mask of shape"),
        "embeddings": ({"inputs_embeds": embeds}, "inputs_embeds"),
        "another layer": ({"vision_feature_layer": -1}, "vision_feature_layer=-1"),
        "layers": ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        "CLS": ({"vision_feature_select_strategy": "full"}, "select_strategy='full'"),
        "no ids": ({"input_ids": None}, "without input_ids"),
        "fewer placeholders": ({"input_ids": ids[:, :-30], "attention_mask": mask[:, :-30]}, ""),
        "packed": ({"position_ids": torch.arange(ids.shape[1]).expand(ids.shape) % 50}, "packed"),
        "a tuple for a cache": ({"past_key_values": ((embeds, embeds),)}, "of type tuple"),
        "videos": ({"pixel_values_videos": torch.zeros(1)}, "videos"),
        "another count": ({"pixel_values": given["pixel_values"][:1]}, ""),
    }


@pytest.mark.parametrize(
    "name",
    refused(
        {"input_ids": torch.zeros(2, 99), "attention_mask": torch.zeros(2, 99), "pixel_values": [0]}
    ),
)
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_what_cannot_be_right_is_refused(way, name, bundle, photos):
    inputs = ask(bundle, photos)
    if name == "fewer placeholders":  # truncated
        token = bundle.model.config.image_token_id
        last = int((inputs["input_ids"][1] == token).nonzero()[-1])
        cut = {k: inputs[k][:, :last] for k in ("input_ids", "attention_mask")}
        changed, words = cut, "do not match"
    else:
        changed, words = refused(inputs)[name]
        words = words or "image"
    with prune(bundle.model, METHOD):
        call = bundle.model if way == "forward" else bundle.model.generate
        with pytest.raises(UnsupportedModelError, match=words) as caught:
            call(**{**inputs, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"prefill_chunk_size": 8},
        {"custom_generate": print},
        {"penalty_alpha": 0.6},
    ],
    ids=lambda given: next(iter(given)),
)
def test_ways_to_generate_that_are_refused(given, hf, photos):
    bundle = hf(KINDS[0])
    inputs = ask(bundle, photos)
    if "assistant_model" in given:
        given = {"assistant_model": bundle.model}
    with prune(bundle.model, METHOD):
        with pytest.raises(UnsupportedModelError, match=next(iter(given))):
            bundle.model.generate(**inputs, **given)
        text = bundle.inputs("USER: Hello ASSISTANT:", None)
        if "prompt_lookup_num_tokens" in given:  # of text alone nothing is refused
            bundle.model.generate(**text, **given, max_new_tokens=3)


def test_features_encoded_elsewhere_are_refused(bundle, photos):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if release() < (5, 0):
        pytest.skip("this release takes none")
    inputs = ask(bundle, photos)
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pixels = {k: v for k, v in inputs.items() if k not in text}
        encoded = {"image": bundle.model.get_image_features(**pixels)}
        assert isinstance(encoded["image"], BaseModelOutputWithPooling)
    with prune(bundle.model, METHOD):
        for call in (bundle.model, bundle.model.generate):
            with pytest.raises(UnsupportedModelError, match="mm_encoder_outputs"):
                call(**text, mm_encoder_outputs=encoded)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("vision_feature_layer", [-2, -1]), ("vision_feature_select_strategy", "full")],
)
def test_features_of_several_layers_or_with_cls_are_refused(setting, value, hf):
    own = hf(KINDS[0]).own()
    setattr(own.model.config, setting, value)
    before = state(own.model)
    with pytest.raises(UnsupportedModelError, match=setting):
        prune(own.model, METHOD)
    assert state(own.model) == before


def test_next_without_sizes_or_with_tiles_of_another_cut(hf, photos):
    bundle = hf(KINDS[1])
    inputs = ask(bundle, photos)
    with prune(bundle.model, METHOD), torch.no_grad():
        sizes = inputs.pop("image_sizes")
        with pytest.raises(UnsupportedModelError, match="without image_sizes"):
            bundle.model(**inputs)
        with pytest.raises(UnsupportedModelError, match="do not match"):
            bundle.model(**inputs, image_sizes=torch.tensor([[10, 300], [10, 300]]))
        fewer = {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}
        with pytest.raises(UnsupportedModelError, match="image_grid_pinpoints"):
            bundle.model(**fewer, image_sizes=sizes)
        small = {**inputs, "pixel_values": inputs["pixel_values"][..., :56, :56]}
        with pytest.raises(UnsupportedModelError, match="112 x 112"):
            bundle.model(**small, image_sizes=sizes)
