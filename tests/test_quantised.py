"""4 and 8 bits by the real bitsandbytes, loaded by the stock loader, pruned and not."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from conftest import Bundle
from repacking import multiply_repacked
from safetensors.torch import load_file
from torch import nn

from llava_hvp import HIVTP, HiPrune, HiPrunePlus, prune, unprune
from llava_hvp.encoder.vit import transformer
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.compat import loading
from llava_hvp.hosts.llava.compat.versions import transformers_version
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower
from llava_hvp.runtime import PruningConfig

functions = pytest.importorskip("bitsandbytes").functional
ON_CPU = transformers_version() >= (4, 46)


def quantises(test):
    """Marks a test that loads quantised weights: it runs as on two kinds of CPU."""
    refused = pytest.mark.skipif(
        not ON_CPU and not torch.cuda.is_available(),
        reason="this transformers refuses to quantise without a GPU",
    )
    return pytest.mark.usefixtures("units")(refused(test))


BITS = ["load_4bit", "load_8bit"]
INSIDE = ["llava-next-llama-unfrozen", "llava-next-mistral-unfrozen"]
CASES = [
    ("llava-1.5-llama", "load_4bit"),
    ("llava-1.5-mistral", "load_8bit"),
    ("llava-next-llama-unfrozen", "load_8bit"),
    ("llava-next-mistral-unfrozen", "load_4bit"),
]
# Of the largest weight of a layer: half the widest gap between two NF4 numbers; a step of int8.
ERRORS = {"load_4bit": 0.16, "load_8bit": 0.01}
CPU = {"device": "cpu", "device_map": "cpu"}


def load(path, method=None, **options):
    """By the stock loader, with a method installed where one is given."""
    from llava.model.builder import load_pretrained_model

    if method is not None:
        builder.install(method)
    try:
        tokenizer, model, processor, _ = load_pretrained_model(
            str(path), None, path.name, **(CPU | options)
        )
    finally:
        if method is not None:
            builder.uninstall()
    return Bundle(path, tokenizer, model, processor)


@pytest.fixture(scope="module")
def quantised(checkpoints, units):
    """A function from a name of conftest.KINDS and the bits to an unpruned Bundle."""
    bundles = {}

    def get(kind, bits):
        if (kind, bits) not in bundles:
            bundles[kind, bits] = load(checkpoints(kind), **{bits: True})
        return bundles[kind, bits]

    return get


def arguments_for(bundle, photo):
    return bundle.ids("What is this?"), bundle.pixels(photo).half(), [photo.size]


def linears(model):
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or hasattr(layer, "in_features")
    }


@torch.no_grad()
def weight_of(layer):
    """(out, in) float32, whatever the layer stores."""
    rows = torch.eye(layer.in_features, dtype=torch.float16 if loading._is_packed(layer) else None)
    output = layer(
        rows.to(layer.weight.device) if loading._is_packed(layer) else rows.to(layer.weight)
    )
    bias = 0 if layer.bias is None else layer.bias.float()
    return (output.float() - bias).T


@quantises
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_every_layer_has_the_weights_of_the_file(kind, bits, checkpoints):
    """Also the tower's, where it lies inside: transformers 5 could leave it random silently."""
    # One of its own: where the CPU has bfloat16 units, bitsandbytes rounds a model's scales when
    # its state is asked for.
    bundle = load(checkpoints(kind), **{bits: True})
    stored = {
        name.replace(".vision_model.", "."): weight
        for name, weight in load_file(bundle.path / "model.safetensors").items()
    }
    found = {name.replace(".vision_model.", "."): x for name, x in linears(bundle.model).items()}
    packed = 0
    for name, layer in found.items():
        if f"{name}.weight" not in stored:
            continue  # a tower that lies outside
        expected = stored.pop(f"{name}.weight").float()
        error = (weight_of(layer) - expected).abs().max() / expected.abs().max()
        assert error <= (ERRORS[bits] if loading._is_packed(layer) else 1e-3), name
        packed += loading._is_packed(layer)
    assert packed == 2 * 7 + 2 + (24 * 6 if kind in INSIDE else 0)
    held = {k.replace(".vision_model.", "."): v for k, v in bundle.model.state_dict().items()}
    for name, weight in stored.items():
        assert torch.equal(held[name], weight), name


@quantises
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_keeping_everything_is_stock_bit_for_bit(kind, bits, quantised, photos):
    bundle = quantised(kind, bits)
    arguments = arguments_for(bundle, photos[0])
    installed = load(bundle.path, method=HiPrune(r_max=1.0), **{bits: True})
    assert isinstance(installed.model.get_vision_tower(), PrunedCLIPVisionTower)
    assert torch.equal(installed.embeds(*arguments)[0], bundle.embeds(*arguments)[0])
    assert torch.equal(installed.generate(*arguments), bundle.generate(*arguments))
    report = installed.model.llava_hvp.last[0]
    assert report.kept_tokens == report.stock_tokens


@quantises
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_installed_it_is_pruned_as_by_prune(kind, bits, quantised, photos):
    bundle, method = quantised(kind, bits), HIVTP(r_max=0.25)
    arguments = arguments_for(bundle, photos[0])
    with prune(bundle.model, method) as pruned:
        expected = bundle.generate(*arguments)
    installed = load(bundle.path, method=method, **{bits: True})
    assert torch.equal(installed.generate(*arguments), expected)
    (report,) = installed.model.llava_hvp.last
    assert torch.equal(report.selection.keep, pruned.last[0].selection.keep)
    assert report.tiles == (5 if kind in INSIDE else 1)
    assert 0 < report.kept_of_patches <= 0.25
    unprune(installed.model)
    assert torch.equal(installed.generate(*arguments), bundle.generate(*arguments))


@quantises
@pytest.mark.parametrize("method", [HIVTP(r_max=0.25), HiPrune(r_max=0.25)], ids=lambda m: m.name)
@pytest.mark.parametrize("bits", BITS)
def test_a_tower_outside_keeps_what_it_keeps_beside_a_float_model(
    bits, method, quantised, checkpoints, photos
):
    float_bundle = load(checkpoints("llava-1.5-llama"), method=method)
    bundle = quantised("llava-1.5-llama", bits)
    arguments = arguments_for(bundle, photos[1])
    stock = bundle.embeds(*arguments)[0][0]
    float_bundle.embeds(*arguments)
    with prune(bundle.model, method) as pruned:
        embeds = bundle.embeds(*arguments)[0][0]
    keep = pruned.last[0].selection.keep
    assert torch.equal(keep, float_bundle.model.llava_hvp.last[0].selection.keep)
    # The kept tokens are stock's, to the rounding of a matrix product of another shape.
    start = int((arguments[0][0] == -200).nonzero())
    tokens = embeds[start : start + int(keep.sum())]
    torch.testing.assert_close(tokens, stock[start : start + 64][keep[0]], rtol=0, atol=0.02)


@quantises
@pytest.mark.parametrize("bits", BITS)
def test_a_tower_inside_keeps_what_its_dequantised_copy_keeps(bits, quantised, photos):
    bundle = quantised(INSIDE[0], bits)
    pixels = bundle.pixels(photos[0]).half()[0]
    tower = copy.deepcopy(bundle.model.get_vision_tower())
    PrunedCLIPVisionTower.adopt(tower, PruningConfig(HIVTP(r_max=0.25)))
    ours = tower.encode(pixels, (5,)).selection.keep
    tower.release()
    for block in transformer(tower.vision_tower).encoder.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if loading._is_packed(layer):
                    setattr(parent, name, as_float(layer))
    tower.float()
    PrunedCLIPVisionTower.adopt(tower, PruningConfig(HIVTP(r_max=0.25)))
    theirs = tower.encode(pixels.float(), (5,)).selection.keep
    # Half precision, and int8 of the activations, move scores that are nearly equal.
    assert (ours & theirs).sum() >= 0.9 * ours.sum()
    assert ours.sum() == theirs.sum()


def as_float(layer):
    copied = nn.Linear(layer.in_features, layer.out_features)
    copied.load_state_dict({"weight": weight_of(layer), "bias": layer.bias.float()})
    return copied


@quantises
@pytest.mark.parametrize(("kind", "bits"), CASES[1::2])
def test_stock_defaults_without_cuda(kind, bits, checkpoints, photos):
    """`device="cuda", device_map="auto"`, as all stock scripts have it."""
    options = {bits: True, "device": "cuda", "device_map": "auto"}
    bundle = load(checkpoints(kind), method=HiPrune(r_max=0.25), **options)
    bundle.generate(*arguments_for(bundle, photos[0]))
    assert bundle.model.llava_hvp.last[0].kept_of_patches == 0.25


@quantises
def test_dispatch_hooks_do_not_bypass_pruning(quantised, photos):
    """accelerate's, which old transformers put on every quantised model, on every module."""
    from accelerate import dispatch_model

    method, stock = HIVTP(r_max=0.25), quantised(INSIDE[1], "load_4bit")
    arguments = arguments_for(stock, photos[0])
    with prune(stock.model, method):
        embeds, answer = stock.embeds(*arguments)[0], stock.generate(*arguments)
    assert not torch.equal(stock.generate(*arguments), answer)
    # New ones, which have not run: accelerate asks for the state, and see the next test.
    bundle = load(stock.path, load_4bit=True)
    installed = load(stock.path, method=method, load_4bit=True)
    for model in (bundle.model, installed.model):
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        tower = model.get_vision_tower()
        query = transformer(tower.vision_tower).encoder.layers[0].self_attn.q_proj
        assert all("forward" in vars(module) for module in (model, tower, query))
    prune(bundle.model, method)
    for dispatched in (bundle, installed):
        assert torch.equal(dispatched.embeds(*arguments)[0], embeds)
        assert torch.equal(dispatched.generate(*arguments), answer)
        assert 0 < dispatched.model.llava_hvp.last[0].kept_of_patches <= 0.25


def quantised_layer():
    """One of bitsandbytes' own, always the same."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw).half()
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float16, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu").eval(), torch.randn(5, 128, generator=draw).half()


def test_a_cpu_with_units_keeps_no_bits_of_a_state_that_was_asked_for(units):
    """Why no test may read a 4-bit model's state between two runs that it compares."""
    layer, rows = quantised_layer()
    with torch.no_grad():
        before = layer(rows)
        assert torch.equal(layer(rows), before)
        assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == units
        layer.state_dict()
        assert torch.equal(layer(rows), before) == (not units)


def test_repacked_weights_multiply_as_they_did(units):
    layer, rows = quantised_layer()
    with torch.no_grad():
        weight = layer.weight.data, layer.weight.quant_state
        plain = rows @ functions.dequantize_4bit(*weight).T
        torch.testing.assert_close(layer(rows), plain, rtol=0, atol=0.25 if units else 0.02)
        if units:
            slow = multiply_repacked(rows, layer.weight.data, state=layer.weight.quant_state)
            torch.testing.assert_close(layer(rows), slow, rtol=0, atol=0.25)


@quantises
def test_prompt_aware_methods_read_quantised_layers(quantised, photos):
    bundle = quantised("llava-1.5-llama", "load_4bit")
    with prune(bundle.model, HiPrunePlus(r_max=0.25, text="llm")) as pruned:
        bundle.generate(*arguments_for(bundle, photos[0]))
    assert pruned.last[0].selection.roles["text"].any()


@quantises
def test_a_quantised_tower_that_the_checkpoint_lacks_is_never_made_up(
    tmp_path, checkpoints, photos
):
    """It is the tower's own, in float; transformers 4 stops at any packed layer without weights."""
    folder = tmp_path / "llava-1.5-lacking"
    shutil.copytree(checkpoints("llava-1.5-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["unfreeze_mm_vision_tower"] = True
    (folder / "config.json").write_text(json.dumps(config))
    if transformers_version() < (5, 0):
        with pytest.raises(AttributeError, match="`weight` is not"):
            load(folder, load_4bit=True)
        return
    bundle = load(folder, load_4bit=True, method=HiPrune(num_tokens=9))
    held = bundle.model.get_vision_tower().vision_tower.state_dict()
    own = transformers.CLIPVisionModel.from_pretrained(config["mm_vision_tower"]).state_dict()
    assert held.keys() == own.keys()
    for key, tensor in own.items():
        assert torch.equal(held[key], tensor.half()), key
    bundle.generate(*arguments_for(bundle, photos[0]))
    assert bundle.model.llava_hvp.last[0].kept_tokens == 9


@quantises
def test_what_is_not_quantised_is_float16_whatever_the_checkpoint_says(tmp_path, checkpoints):
    """As on transformers 4; on 5 a bfloat16 checkpoint would not take the images' float16."""
    folder = tmp_path / "llava-1.5-bfloat16"
    shutil.copytree(checkpoints("llava-1.5-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    model = load(folder, load_4bit=True).model
    assert model.get_model().embed_tokens.weight.dtype == model.lm_head.weight.dtype
    assert model.lm_head.weight.dtype == torch.float16
    assert load(folder, load_4bit=True, torch_dtype=torch.bfloat16).model.lm_head.weight.dtype == (
        torch.bfloat16
    )


@pytest.mark.skipif(ON_CPU or torch.cuda.is_available(), reason="this transformers quantises here")
@pytest.mark.parametrize("bits", BITS)
def test_a_transformers_that_refuses_says_so_and_nothing_is_left_half_done(
    bits, checkpoints, photos
):
    with pytest.raises(RuntimeError, match="No GPU found"):
        load(checkpoints("llava-1.5-llama"), method=HIVTP(r_max=0.25), **{bits: True})
    bundle = load(checkpoints("llava-1.5-llama"), method=HIVTP(r_max=0.25))
    assert isinstance(bundle.model.get_vision_tower(), PrunedCLIPVisionTower)


NF4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "quantization_config": NF4},
        {"load_in_4bit": True, "load_in_8bit": False, "quantization_config": NF4},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ],
    ids=["stock 8 bits", "stock 4 bits", "as the training script", "with an option"],
)
def test_flags_become_one_config(arguments):
    given = loading._quantisation(dict(arguments))
    config = given.pop("quantization_config")
    assert given == {"torch_dtype": torch.float16}
    assert config.load_in_8bit == arguments.get("load_in_8bit", False)
    assert config.load_in_4bit == arguments.get("load_in_4bit", False)
    assert config.bnb_4bit_quant_type == ("nf4" if config.load_in_4bit else "fp4")
    assert config.llm_int8_skip_modules is None


def test_without_flags_nothing_changes():
    arguments = {"quantization_config": NF4, "device_map": "auto", "config": object()}
    assert loading._quantisation(arguments) is arguments


def test_a_flag_that_contradicts_the_config_is_left_to_be_refused(checkpoints):
    given = loading._quantisation({"load_in_8bit": True, "quantization_config": NF4})
    assert given["load_in_8bit"] is True
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"load_in_8bit|No GPU"):
        load(checkpoints("llava-1.5-llama"), load_8bit=True, quantization_config=NF4)


def test_a_config_of_the_users_is_not_written_to():
    given = loading._quantisation(
        {"load_in_4bit": True, "quantization_config": NF4, "config": object()}
    )
    assert "model.mm_projector" in given["quantization_config"].llm_int8_skip_modules
    assert NF4.llm_int8_skip_modules is None
