"""Putting a method on a model and taking it off: errors, undo, the stock loader."""

import copy
import json
import shutil

import pytest
import torch
from conftest import load
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_hvp import HIVTP, HiPrune, HiPrunePlus, LlavaHvpError, Random, prune, unprune
from llava_hvp.errors import (
    LayerError,
    OptionError,
    PrunedStateError,
    ScoreError,
    TextEncoderError,
    UnsupportedModelError,
)
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.testing import make_checkpoint, make_clip


def state(model):
    """Everything that pruning could leave behind, of every module."""
    return {
        name: (
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_forward")},
            {
                k: dict(v)
                for k, v in vars(module).items()
                if k.startswith("_forward") and v is not None and not isinstance(v, bool)
            },
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", ["llava-1.5-llama", "llava-next-mistral-unfrozen"])
def test_unprune_gives_the_very_model_back(kind, loaded, photos):
    bundle = loaded(kind)
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    answer = bundle.generate(*arguments)  # first: transformers notes its own first run on a module
    before = state(bundle.model)
    keys = list(bundle.model.state_dict())
    prune(bundle.model, HiPrunePlus(r_max=0.25))
    assert type(bundle.model.get_vision_tower()) is PrunedCLIPVisionTower
    assert list(bundle.model.state_dict()) == keys
    assert not torch.equal(answer, bundle.generate(*arguments))
    unprune(bundle.model)
    assert state(bundle.model) == before
    assert torch.equal(answer, bundle.generate(*arguments))


def test_with_block_ends_pruning_also_on_an_error(loaded):
    bundle = loaded("llava-1.5-llama")
    before = state(bundle.model)
    with pytest.raises(ZeroDivisionError), prune(bundle.model, HIVTP(r_max=0.5)):
        raise ZeroDivisionError
    assert state(bundle.model) == before


def test_unprune_inside_the_block_is_no_error(loaded):
    bundle = loaded("llava-1.5-llama")
    with prune(bundle.model, HIVTP(r_max=0.5)):
        unprune(bundle.model)
    assert "llava_hvp" not in vars(bundle.model)


def test_pruned_twice_and_unpruned_twice_are_errors(loaded):
    bundle = loaded("llava-1.5-llama")
    with prune(bundle.model, HIVTP(r_max=0.5)) as pruned:
        with pytest.raises(PrunedStateError, match="unprune"):
            prune(bundle.model, HiPrune(r_max=0.5))
        assert pruned.method == HIVTP(r_max=0.5)
    with pytest.raises(PrunedStateError, match="not pruned"):
        unprune(bundle.model)


def test_what_is_not_llava_is_refused(loaded):
    plain = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=8,
        )
    )
    for model in (plain, object(), None):
        with pytest.raises(UnsupportedModelError, match="not a LLaVA model"):
            prune(model, HIVTP(r_max=0.5))
    with pytest.raises(UnsupportedModelError, match="no Method"):
        prune(loaded("llava-1.5-llama").model, 7)


def test_a_wrapper_around_llava_is_looked_into(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with prune(torch.nn.Sequential(bundle.model), Random(num_tokens=7)) as pruned:
        bundle.embeds(bundle.ids("x"), bundle.pixels(photos[0]), None)
    assert pruned.last[0].kept_tokens == 7


def test_a_model_without_a_vision_tower_is_refused(own):
    model = own("llava-1.5-llama").model
    del model.get_model().vision_tower
    with pytest.raises(UnsupportedModelError, match="no vision tower"):
        prune(model, HIVTP(r_max=0.5))


class OtherTower(torch.nn.Module):
    is_loaded = True


def test_towers_that_we_cannot_read_are_refused_and_left_alone(own):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    model = own("llava-1.5-llama").model
    tower = model.get_vision_tower()

    class CLIPVisionTowerS2(CLIPVisionTower):
        """As LLaVA's own: several scales, so no one grid."""

    for change, message in (
        (lambda: setattr(tower, "__class__", CLIPVisionTowerS2), "CLIPVisionTowerS2"),
        (lambda: setattr(tower, "is_loaded", False), "load_model"),
        (lambda: setattr(tower, "select_feature", "cls_patch"), "cls_patch"),
        (lambda: setattr(tower, "vision_tower", torch.nn.Conv2d(3, 8, 3)), "Conv2d"),
    ):
        saved = {
            name: getattr(tower, name) for name in ("is_loaded", "select_feature", "vision_tower")
        }
        change()
        kind = type(tower)
        with pytest.raises(UnsupportedModelError, match=message):
            prune(model, HIVTP(r_max=0.5))
        assert type(tower) is kind
        assert "llava_hvp" not in vars(model)
        tower.__class__ = CLIPVisionTower
        for name, value in saved.items():
            setattr(tower, name, value)
    model.get_model().vision_tower = OtherTower()
    with pytest.raises(UnsupportedModelError, match="OtherTower"):
        prune(model, HIVTP(r_max=0.5))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (HIVTP(r_max=0.5, layers=(7, 24)), LayerError, "past layer 23"),
        (HIVTP(r_max=0.5, layers=(0,)), LayerError, "layer 0"),
        (HIVTP(r_max=0.5, layers=(25,)), LayerError, "layer 25"),
        (HiPrune(r_max=0.5, object_layer=24), LayerError, "24"),
        (HIVTP(r_max=0.1, window=2), OptionError, "window=2"),
    ],
)
def test_options_that_this_tower_cannot_meet_leave_the_model_as_it_was(
    method, error, message, loaded
):
    bundle = loaded("llava-1.5-llama")
    before = state(bundle.model)
    with pytest.raises(error, match=message):
        prune(bundle.model, method)
    assert state(bundle.model) == before


def test_scores_that_are_not_finite_name_the_layer(own, photos):
    bundle = own("llava-1.5-llama")
    vit = bundle.model.get_vision_tower().vision_tower
    vit = getattr(vit, "vision_model", vit)
    with prune(bundle.model, HIVTP(r_max=0.5)):
        vit.encoder.layers[8].self_attn.k_proj.bias.data.fill_(float("inf"))
        with pytest.raises(ScoreError, match=r"received_attention\[9\].*bfloat16"):
            bundle.generate(bundle.ids("What?"), bundle.pixels(photos[0]), None)


def test_hiprune_plus_without_a_text_encoder(tmp_path):
    tower = make_clip(tmp_path / "clip", image_size=112, text=False)
    bundle = load(make_checkpoint(tmp_path / "llava-no-text", vision_tower=tower))
    before = state(bundle.model)
    with pytest.raises(TextEncoderError, match="text='llm'"):
        prune(bundle.model, HiPrunePlus(r_max=0.5))
    assert state(bundle.model) == before
    with prune(bundle.model, HiPrunePlus(r_max=0.5, text="llm")):
        assert isinstance(bundle.model.get_vision_tower(), PrunedCLIPVisionTower)


def test_hiprune_plus_without_a_prompt(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with prune(bundle.model, HiPrunePlus(r_max=0.5)):
        with pytest.raises(TextEncoderError, match="input_ids"):
            bundle.model.encode_images(bundle.pixels(photos[0]))
        with pytest.raises(TextEncoderError, match="no text"):
            bundle.generate(bundle.ids(""), bundle.pixels(photos[0]), None)


def test_encode_images_gives_kept_tokens_of_each_image(loaded, photos):
    bundle = loaded("llava-1.5-llama")
    with prune(bundle.model, HiPrune(num_tokens=20)):
        features = bundle.model.encode_images(bundle.pixels(*photos[:3]))
    assert [tuple(f.shape) for f in features] == [(20, 64)] * 3


def test_pruned_tower_alone_gives_lists_that_stock_code_cannot_mistake(loaded, photos):
    """A model that lost our encode_images must fail, not run unpruned."""
    bundle = loaded("llava-1.5-llama")
    pixels = bundle.pixels(*photos[:2])
    with prune(bundle.model, HiPrune(num_tokens=20)):
        features = bundle.model.get_vision_tower()(pixels)
        assert [len(f) for f in features] == [20, 20]
        del bundle.model.encode_images
        with pytest.raises((TypeError, AttributeError)):
            bundle.model.encode_images(pixels)
    assert "encode_images" not in vars(bundle.model)


def test_a_tower_exchanged_behind_our_back_is_an_error(own, photos):
    bundle = own("llava-1.5-llama")
    with prune(bundle.model, HIVTP(r_max=0.5)):
        bundle.model.get_vision_tower().release()
        with pytest.raises(UnsupportedModelError, match="set up for pruning"):
            bundle.generate(bundle.ids("x"), bundle.pixels(photos[0]), None)


def test_accelerate_hooks_do_not_bypass_pruning(own, photos):
    """accelerate binds `forward` to the class of load time, on every module it dispatches."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    bundle = own("llava-1.5-llama")
    tower = bundle.model.get_vision_tower()
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), None
    with prune(bundle.model, HIVTP(r_max=0.25)):
        expected = bundle.generate(*arguments)
    for module in (bundle.model, tower, tower.vision_tower):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert "forward" in vars(tower)
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        assert torch.equal(bundle.generate(*arguments), expected)
    assert pruned.last[0].kept_tokens < 64


def test_modules_replaced_after_pruning_are_hooked_anew(own, photos):
    """As quantised loading does with every Linear of a v1.6 tower."""
    bundle = own("llava-1.5-llama")
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), None
    with prune(bundle.model, HIVTP(r_max=0.25)) as pruned:
        bundle.generate(*arguments)
        expected = pruned.last[0].selection.keep
        vit = bundle.model.get_vision_tower().vision_tower
        for layer in getattr(vit, "vision_model", vit).encoder.layers:
            stock = layer.self_attn.q_proj
            layer.self_attn.q_proj = torch.nn.Linear(stock.in_features, stock.out_features)
            layer.self_attn.q_proj.load_state_dict(stock.state_dict())
        bundle.generate(*arguments)
        assert torch.equal(pruned.last[0].selection.keep, expected)


def test_another_select_layer_is_taken_up_as_stock_takes_it(own, photos):
    bundle = own("llava-1.5-llama")
    tower, pixels = bundle.model.get_vision_tower(), bundle.pixels(photos[0])
    with prune(bundle.model, HIVTP(r_max=0.5, layers=(8, 9))) as pruned:
        bundle.model.encode_images(pixels)
        tower.select_layer = -5
        later = bundle.model.encode_images(pixels)[0]
        assert tower.plan().feature_layer == 20
        keep = pruned.last[0].selection.keep
        tower.select_layer = 7
        with pytest.raises(LayerError, match="past layer 7"):
            bundle.model.encode_images(pixels)
        tower.select_layer = -5
    with torch.no_grad():
        stock = bundle.model.encode_images(pixels)[keep]
    assert torch.allclose(later, stock, atol=1e-5)


def test_a_copy_of_a_pruned_model_is_pruned_by_itself(own, photos):
    bundle = own("llava-1.5-llama")

    def hooks(model):  # not zero before: transformers 5 keeps some of its own
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks(bundle.model)
    with prune(bundle.model, HIVTP(r_max=0.25)):
        copied = copy.deepcopy(bundle.model)
        assert hooks(copied) == before + 2 * 4
    assert copied.llava_hvp.model is copied
    bundle.model = copied
    ids = bundle.ids("x")
    assert bundle.embeds(ids, bundle.pixels(photos[0]), None)[0].shape[1] < ids.shape[1] + 63
    unprune(copied)
    assert hooks(copied) == before
    assert bundle.embeds(ids, bundle.pixels(photos[0]), None)[0].shape[1] == ids.shape[1] + 63


# --- the entry point of the stock loader ---


@pytest.mark.parametrize(
    "kind", ["llava-1.5-llama", "llava-1.5-llama-unfrozen", "llava-next-mistral-unfrozen"]
)
def test_installed_the_stock_loader_gives_what_prune_would(kind, loaded, checkpoints, photos):
    bundle = loaded(kind)
    arguments = bundle.ids("What is this?"), bundle.pixels(photos[0]), [photos[0].size]
    with prune(bundle.model, HIVTP(r_max=0.25)):
        expected = bundle.generate(*arguments)
    builder.install(HIVTP(r_max=0.25))
    try:
        installed = load(checkpoints(kind))
    finally:
        builder.uninstall()
    assert torch.equal(installed.generate(*arguments), expected)
    assert installed.model.llava_hvp.last[0].kept_tokens < bundle.model.config.hidden_size * 5
    unprune(installed.model)
    assert torch.equal(installed.generate(*arguments), bundle.generate(*arguments))
    assert type(installed.model.get_vision_tower()) is type(bundle.model.get_vision_tower())


def test_installed_build_vision_tower_gives_a_pruned_tower(checkpoints, loaded, photos):
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    bundle = loaded("llava-1.5-llama")
    builder.install(HiPrune(num_tokens=9))
    try:
        tower = build_vision_tower(bundle.model.config)
    finally:
        builder.uninstall()
    assert [len(f) for f in tower(bundle.pixels(*photos[:2]))] == [9, 9]
    assert type(build_vision_tower(bundle.model.config)) is CLIPVisionTower


def test_installed_hiprune_plus_reads_the_prompt(checkpoints, photos):
    builder.install(HiPrunePlus(num_tokens=20))
    try:
        bundle = load(checkpoints("llava-1.5-llama"))
    finally:
        builder.uninstall()
    kept = []
    for question in ("Is there a rocket?", "What is the weather like in the mountains today?"):
        bundle.generate(bundle.ids(question), bundle.pixels(photos[0]), None)
        kept.append(bundle.model.llava_hvp.last[0].selection.roles["text"])
    assert all(int(mask.sum()) == 2 for mask in kept)


def test_install_is_undone_exactly_and_refuses_to_stack():
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder import builder as towers

    before = dict(vars(towers)), dict(vars(LlavaLlamaForCausalLM))
    with pytest.raises(PrunedStateError, match="nothing to undo"):
        builder.uninstall()
    builder.install(HIVTP(r_max=0.5))
    with pytest.raises(PrunedStateError, match="uninstall"):
        builder.install(HIVTP(r_max=0.5))
    builder.uninstall()
    assert (dict(vars(towers)), dict(vars(LlavaLlamaForCausalLM))) == before
    with pytest.raises(LlavaHvpError, match="no Method"):
        builder.install("hivtp")


def test_installed_options_that_the_tower_cannot_meet_stop_the_load(checkpoints):
    builder.install(HIVTP(r_max=0.5, layers=(24,)))
    try:
        with pytest.raises(LayerError, match="past layer 23"):
            load(checkpoints("llava-1.5-llama"))
    finally:
        builder.uninstall()


def test_installed_a_checkpoint_of_transformers_own_form_is_refused(checkpoints, tmp_path):
    folder = tmp_path / "llava-of-transformers"
    shutil.copytree(checkpoints("llava-1.5-llama"), folder)
    config = {"model_type": "llava", "text_config": {}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    builder.install(HIVTP(r_max=0.5))
    try:
        with pytest.raises(UnsupportedModelError, match="convert FOLDER"):
            load(folder)
    finally:
        builder.uninstall()


def test_a_tower_of_another_depth_scales_the_default_layers(tmp_path, photos):
    tower = make_clip(tmp_path / "clip", layers=12, image_size=112)
    bundle = load(make_checkpoint(tmp_path / "llava-12", vision_tower=tower))
    with prune(bundle.model, HIVTP(r_max=0.5)):
        assert bundle.model.get_vision_tower().plan().needs.received_attention == (4, 5)
        bundle.generate(bundle.ids("x"), bundle.pixels(photos[0]), None)


def test_a_raw_clip_model_is_a_tower_we_can_read():
    from llava_hvp.encoder.vit import read_geometry

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    geometry = read_geometry(CLIPVisionModel(config))
    assert (geometry.grid, geometry.depth, geometry.heads) == ((2, 2), 2, 2)
    assert [geometry.normalised(layer) for layer in (-2, -1, 0, 1, 2)] == [1, 2, 0, 1, 2]
