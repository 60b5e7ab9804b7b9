"""LoRA and projector-only checkpoints beside a base model, by the stock loader, pruned and not."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Bundle
from safetensors.torch import load_file, save_file

from llava_hvp import HIVTP, HiPrune, prune
from llava_hvp.hosts.llava import builder
from llava_hvp.hosts.llava.compat.versions import transformers_version

# A tower inside has layers of the names that the adapter is for, and no adapter of its own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys:UserWarning", "ignore:Merge lora module to:UserWarning"
)
KINDS = ["llava-1.5-llama", "llava-next-llama-unfrozen"]
# What a LLaVA checkpoint has and the language model under it lacks.
VISION = ("model.mm_projector.", "model.vision_tower.", "model.image_newline")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8
quantises = pytest.mark.skipif(
    transformers_version() < (4, 46), reason="this transformers refuses to quantise without a GPU"
)


@pytest.fixture
def peft():
    try:
        import peft
    except ImportError as error:
        pytest.skip(f"this peft does not import beside this transformers: {error}")
    return peft


@dataclass
class Parts:
    """A checkpoint taken apart: its weights, the language model, and what was trained on it."""

    weights: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]
    base: Path
    lora: Path
    projector: Path

    def merged(self, name):
        """The weight of one layer with its adapter."""
        key = f"base_model.model.{name.removesuffix('.weight')}"
        update = self.adapter[f"{key}.lora_B.weight"] @ self.adapter[f"{key}.lora_A.weight"]
        return self.weights[name].float() + ALPHA / RANK * update


@pytest.fixture(scope="module")
def parts(checkpoints, tmp_path_factory):
    """A function from a name of KINDS to its Parts."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = take_apart(checkpoints(kind), tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def take_apart(checkpoint, root):
    """Write what LLaVA's training scripts leave: a base, a LoRA and a projector folder."""
    weights = load_file(checkpoint / "model.safetensors")
    vision = {name: weight for name, weight in weights.items() if name.startswith(VISION)}
    config = json.loads((checkpoint / "config.json").read_text())
    base, lora, projector = (root / name for name in ("vicuna", "llava-lora", "llava-projector"))
    shutil.copytree(checkpoint, base)
    own = ("mm_", "image_", "unfreeze_", "tune_", "freeze_", "tokenizer_")
    language = {key: value for key, value in config.items() if not key.startswith(own)}
    language |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(language))
    spoken = {name: weight for name, weight in weights.items() if name not in vision}
    save_file(spoken, base / "model.safetensors", metadata={"format": "pt"})
    for folder in (lora, projector):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))

    random, adapter = torch.Generator().manual_seed(0), {}
    for name, weight in spoken.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            adapter[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) / 8
            adapter[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=random) / 8
    save_file(adapter, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "bias": "none"}
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    (lora / "adapter_config.json").write_text(
        json.dumps(kind | options | {"base_model_name_or_path": str(base)})
    )
    trained = {f"base_model.model.{name}": weight for name, weight in vision.items()}
    torch.save(trained, lora / "non_lora_trainables.bin")
    brought = {name: w for name, w in vision.items() if "vision_tower" not in name}
    torch.save(brought, projector / "mm_projector.bin")
    return Parts(weights, adapter, base, lora, projector)


def load(path, base, method=None, **options):
    """By the stock loader, with a method installed where one is given."""
    from llava.model.builder import load_pretrained_model

    if method is not None:
        builder.install(method)
    try:
        tokenizer, model, processor, _ = load_pretrained_model(
            str(path), str(base), path.name, device="cpu", device_map="cpu", **options
        )
    finally:
        if method is not None:
            builder.uninstall()
    return Bundle(path, tokenizer, model if options else model.float(), processor)


def state_of(model):
    """Under the names of transformers 4."""
    tower = "model.vision_tower.vision_tower."
    return {
        key.replace(tower, f"{tower}vision_model.")
        if f"{tower}vision_model." not in key
        else key: w
        for key, w in model.state_dict().items()
    }


def assert_brought(model, parts, names=VISION):
    """What the LoRA or projector folder brings is in the model, value for value."""
    state = state_of(model)
    brought = [name for name in parts.weights if name.startswith(names)]
    assert len(brought) >= 4
    for name in brought:
        assert torch.equal(state[name].float(), parts.weights[name].float()), name


def arguments_for(bundle, photo):
    return bundle.ids("What is this?"), bundle.pixels(photo), [photo.size]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_merged_and_the_rest_of_its_training_loaded(kind, parts, peft):
    """Under transformers 5 the tower's names differ, and `strict=False` would leave it out."""
    made = parts(kind)
    model = load(made.lora, made.base, method=HIVTP(r_max=0.5)).model
    assert_brought(model, made)
    state = model.state_dict()
    for name, weight in made.weights.items():
        if name.startswith(VISION):
            continue
        expected = made.merged(name) if name.endswith("_proj.weight") else weight.float()
        # The loader merges in float16.
        torch.testing.assert_close(state[name], expected, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projector_is_loaded_beside_its_base(kind, parts):
    made = parts(kind)
    model = load(made.projector, made.base, method=HIVTP(r_max=0.5)).model
    assert_brought(model, made, ("model.mm_projector.", "model.image_newline"))
    state = state_of(model)
    for name, weight in made.weights.items():
        if not name.startswith(VISION):
            assert torch.equal(state[name], weight.float()), name
    own = load_file(Path(model.config.mm_vision_tower) / "model.safetensors")
    for name, weight in own.items():
        if name.startswith("vision_model."):
            held = state[f"model.vision_tower.vision_tower.{name}"]
            assert torch.equal(held, weight.half().float()), name


@pytest.mark.parametrize("part", ["lora", "projector"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pruned_and_keeping_everything_changes_no_bit(kind, part, parts, photos, request):
    if part == "lora":
        request.getfixturevalue("peft")
    made = parts(kind)
    path = getattr(made, part)
    stock = load(path, made.base)
    arguments = arguments_for(stock, photos[0])
    expected = stock.generate(*arguments)
    assert torch.equal(
        load(path, made.base, method=HiPrune(r_max=1.0)).generate(*arguments), expected
    )
    installed = load(path, made.base, method=HIVTP(r_max=0.25))
    answer = installed.generate(*arguments)
    assert not torch.equal(answer, expected)
    (report,) = installed.model.llava_hvp.last
    assert report.tiles == (1 if kind == KINDS[0] else 5)
    assert 0 < report.kept_of_patches <= 0.25
    # peft dispatches what it merges by accelerate's hooks, which bind `forward` at load time.
    with prune(stock.model, HIVTP(r_max=0.25)):
        assert torch.equal(stock.generate(*arguments), answer)


@pytest.mark.usefixtures("units")
@quantises
@pytest.mark.parametrize(("part", "bits"), [("lora", "load_4bit"), ("projector", "load_8bit")])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_what_comes_later_stays_in_float(kind, part, bits, parts, photos, request):
    """Stock would pack the projector before its weights come, and packed layers take none."""
    pytest.importorskip("bitsandbytes")
    if part == "lora":
        request.getfixturevalue("peft")
    made = parts(kind)
    bundle = load(getattr(made, part), made.base, method=HiPrune(r_max=0.25), **{bits: True})
    names = VISION if part == "lora" else ("model.mm_projector.", "model.image_newline")
    assert_brought(bundle.model, made, names)
    layer = bundle.model.get_model().layers[1].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes.")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = made.merged(name) if part == "lora" else made.weights[name].float()
    with torch.no_grad():
        held = layer(torch.eye(64, dtype=torch.float16)).float().T
    assert (held - expected).abs().max() < 0.2 * expected.abs().max()
    ids, pixels, sizes = arguments_for(bundle, photos[0])
    bundle.generate(ids, pixels.half(), sizes)
    (report,) = bundle.model.llava_hvp.last
    assert report.selection.keep.sum() == 16 * report.tiles
