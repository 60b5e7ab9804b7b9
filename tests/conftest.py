"""Real LLaVA on tiny checkpoints, loaded once a run by the stock loader."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_models
import pytest
import skimage
import torch
from PIL import Image
from repacking import bfloat16_units

from llava_hvp.hosts.llava import compat
from llava_hvp.testing import make_checkpoint, make_clip

# Tiny tensors: more threads only wait for each other.
torch.set_num_threads(1)

SYSTEM = "A chat between a curious user and an artificial intelligence assistant."
PHOTOS = ("rocket.jpg", "astronaut.png", "coffee.png", "chelsea.png")

# name -> how to make it; unfrozen checkpoints bring their own tower, as all of v1.6 do.
KINDS: dict[str, dict[str, Any]] = {
    "llava-1.5-llama": {"version": "1.5"},
    "llava-1.5-mistral": {"version": "1.5", "language": "mistral"},
    "llava-1.5-llama-unfrozen": {"version": "1.5", "unfreeze_mm_vision_tower": True},
    "llava-next-llama": {"version": "next"},
    "llava-next-llama-unfrozen": {"version": "next", "unfreeze_mm_vision_tower": True},
    "llava-next-mistral-unfrozen": {
        "version": "next",
        "language": "mistral",
        "unfreeze_mm_vision_tower": True,
    },
    "llava-next-spatial": {"version": "next", "mm_patch_merge_type": "spatial"},
    "llava-1.5-336": {"version": "1.5"},
    "llava-next-336": {"version": "next"},
}


@dataclass
class Bundle:
    """What `load_pretrained_model` gives, in float32 on the CPU."""

    path: Path
    tokenizer: Any
    model: Any
    processor: Any

    @property
    def is_next(self) -> bool:
        return "next" in self.path.name

    def pixels(self, *images: Image.Image) -> Any:
        """As LLaVA's `process_images` gives them: 4-D, 5-D, or a list where shapes differ."""
        from llava.mm_utils import process_images

        pixels = process_images(list(images), self.processor, self.model.config)
        return [p.float() for p in pixels] if isinstance(pixels, list) else pixels.float()

    def ids(self, question: str, images: int = 1) -> torch.Tensor:
        """(1, L) prompt of the `vicuna_v1` conversation."""
        from llava.mm_utils import tokenizer_image_token

        marks = "<image>\n" * images
        prompt = f"{SYSTEM} USER: {marks}{question} ASSISTANT:"
        return tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")[None]

    def generate(self, ids: Any, images: Any, sizes: Any, tokens: int = 6, **kwargs: Any) -> Any:
        """Greedy ids, always `tokens` of them."""
        return self.model.generate(
            ids,
            images=images,
            image_sizes=sizes,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            **kwargs,
        )[:, -tokens:]

    def embeds(self, ids: Any, images: Any, sizes: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the language model gets: (embeddings, attention mask, position ids, labels)."""
        arguments = {"position_ids": None, "attention_mask": None, "labels": None} | kwargs
        with torch.no_grad():
            _, positions, mask, _, embeds, labels = self.model.prepare_inputs_labels_for_multimodal(
                ids,
                arguments["position_ids"],
                arguments["attention_mask"],
                None,
                arguments["labels"],
                images,
                sizes,
            )
        return embeds, mask, positions, labels


@pytest.fixture(scope="session", autouse=True)
def _bridged():
    """Stock LLaVA generates on every transformers release of the matrix."""
    compat.bridge()
    yield
    compat.unbridge()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A function from a name of KINDS to the folder of its checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    # 8 x 8 patches a tile keep the suite fast; "llava-…-336" have the real 24 x 24.
    towers: dict[int, Path] = {}

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            side = 336 if name.endswith("-336") else 112
            if side not in towers:
                towers[side] = make_clip(root / f"clip-{side}", image_size=side)
            make_checkpoint(folder, vision_tower=towers[side], **KINDS[name])
        return folder

    return make


@pytest.fixture(scope="session")
def loaded(checkpoints):
    """A function from a name of KINDS to its Bundle; every test leaves the model unpruned."""
    bundles: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in bundles:
            bundles[name] = load(checkpoints(name))
        assert "llava_hvp" not in bundles[name].model.__dict__, "a test left its pruning on"
        return bundles[name]

    return get


@pytest.fixture(scope="session")
def deep(checkpoints, tmp_path_factory):
    """A function from a name of `inside.KINDS` to its Bundle; every test leaves it unpruned."""
    import inside

    root, bundles = tmp_path_factory.mktemp("deep"), {}
    tower = checkpoints("llava-1.5-llama").parent / "clip-112"

    def get(name: str = "llava-1.5-llama-deep") -> Bundle:
        if name not in bundles:
            bundles[name] = inside.open_deep(root, tower, name)
        assert "llava_hvp" not in bundles[name].model.__dict__, "a test left its pruning on"
        return bundles[name]

    return get


@pytest.fixture
def double():
    """float64 by default, for the models of `deep`."""
    import inside

    with inside.default_dtype(torch.float64):
        yield


def load(path: Path, **kwargs: Any) -> Bundle:
    """By the stock loader, as a user does."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), None, path.name, device="cpu", device_map="cpu", **kwargs
    )
    return Bundle(path, tokenizer, model.float(), processor)


@pytest.fixture(scope="session")
def hf(checkpoints):
    """A function from a name of KINDS to its HFBundle; every test leaves the model unpruned."""
    bundles: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in bundles:
            source = checkpoints(name)
            bundles[name] = hf_models.load(
                hf_models.convert(source, source.with_name(f"{name}-hf"))
            )
        assert "llava_hvp" not in bundles[name].model.__dict__, "a test left its pruning on"
        return bundles[name]

    return get


@pytest.fixture(params=hf_models.KINDS[:2])
def bundle(request, hf):
    """A LLaVA-1.5 and a LLaVA-NeXT of transformers' own classes."""
    return hf(request.param)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Four real photos of different sizes: 640x427, 512x512, 600x400, 451x300."""
    return [
        Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOS
    ]


@pytest.fixture
def own(loaded):
    """A function from a name to a Bundle that the test may spoil."""

    def get(name: str) -> Bundle:
        bundle = loaded(name)
        return Bundle(bundle.path, bundle.tokenizer, copy.deepcopy(bundle.model), bundle.processor)

    return get


@pytest.fixture(scope="module", params=[False, True], ids=["plain CPU", "bfloat16 CPU"])
def units(request):
    """Whether bitsandbytes finds bfloat16 units in this CPU: both, on every machine."""
    with bfloat16_units(request.param):
        yield request.param
