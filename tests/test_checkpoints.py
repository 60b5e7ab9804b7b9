"""The tiny checkpoints: complete, read by every supported transformers and by the stock loader."""

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_hvp.testing import make_checkpoint, make_clip

PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: ",
    "\nWhat is this? ASSISTANT:",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "llava-v1.5": {"version": "1.5"},
    "llava-v1.5-mistral": {"version": "1.5", "language": "mistral"},
    "llava-v1.6": {"version": "next"},
    "llava-v1.6-mistral": {"version": "next", "language": "mistral"},
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, clip):
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: make_checkpoint(root / name, vision_tower=clip, **arguments)
        for name, arguments in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def pixels(clip):
    from PIL import Image
    from skimage import data
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(clip)
    photos = [Image.fromarray(photo()) for photo in (data.astronaut, data.coffee, data.chelsea)]
    return torch.cat(
        [processor.preprocess(photo, return_tensors="pt")["pixel_values"] for photo in photos]
    )


@pytest.fixture(scope="session")
def stock_load():
    pytest.importorskip("llava")
    from llava.model.builder import load_pretrained_model

    def load(folder):
        return load_pretrained_model(str(folder), None, folder.name, device_map="cpu", device="cpu")

    return load


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def without_level(weights, level="vision_model."):
    """transformers 5 has no ``vision_model`` level in ``CLIPVisionModel``."""
    return {name.replace(level, "", 1): weight for name, weight in weights.items()}


def assert_equal_weights(loaded, stored):
    assert loaded.keys() == stored.keys()
    for name, weight in stored.items():
        assert torch.equal(loaded[name], weight.to(loaded[name].dtype)), name


@pytest.mark.parametrize("make", [make_clip, make_checkpoint])
def test_files_depend_on_the_seed_only(make, tmp_path):
    before = torch.get_rng_state()
    seen = []
    for run, seed in enumerate((0, 0, 1)):
        # One path for all: the config of a checkpoint holds that of its tower.
        folder = make(tmp_path / "here", seed=seed)
        seen.append(digests(folder))
        folder.rename(tmp_path / str(run))
    assert seen[0] == seen[1]
    assert seen[0]["model.safetensors"] != seen[2]["model.safetensors"]
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoints_are_small(checkpoints, clip):
    for folder in (clip, *checkpoints.values()):
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6


@pytest.mark.parametrize("text", [True, False])
def test_vision_tower_has_the_weights_of_the_file(text, tmp_path):
    from transformers import CLIPVisionModel

    folder = make_clip(tmp_path, layers=3, image_size=56, text=text)
    tower = CLIPVisionModel.from_pretrained(folder)
    stored = {name: w for name, w in weights_of(folder).items() if name.startswith("vision_model")}
    assert_equal_weights(without_level(tower.state_dict()), without_level(stored))
    assert all(weight.dtype == torch.float32 for weight in stored.values())
    assert (folder / "vocab.json").exists() == text


def test_whole_clip_has_the_weights_of_the_file(clip):
    from transformers import CLIPModel

    assert_equal_weights(CLIPModel.from_pretrained(clip).state_dict(), weights_of(clip))


def test_clip_without_text_has_the_same_tower(tmp_path):
    whole = weights_of(make_clip(tmp_path / "whole", layers=2))
    vision = weights_of(make_clip(tmp_path / "vision", layers=2, text=False))
    assert all(torch.equal(whole[name], weight) for name, weight in vision.items())
    assert len(vision) < len(whole)


def test_received_attention_ranks_patches(clip, pixels):
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip, attn_implementation="eager")
    with torch.no_grad():
        attentions = tower(pixels, output_attentions=True).attentions
    received = torch.stack([layer.mean(dim=(1, 2))[:, 1:] for layer in attentions])
    assert received.shape == (24, len(pixels), 576)
    variation = received.std(dim=-1) / received.mean(dim=-1)
    assert variation.min() > 0.4
    # Ranks that differ by one of 576 differ by about 1e-3 of the mean: far above 1e-7.
    gaps = received.sort(dim=-1).values.diff(dim=-1) / received.mean(dim=-1, keepdim=True)
    assert gaps.median() > 1e-4
    # The ranking is the photo's, not that of the position embedding alone.
    for layer in received:
        assert torch.corrcoef(layer)[0, 1:].max() < 0.9


def test_sharpness_zero_gives_even_attention(tmp_path, pixels):
    from transformers import CLIPVisionModel

    folder = make_clip(tmp_path, layers=2, sharpness=0.0, text=False)
    tower = CLIPVisionModel.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        attentions = tower(pixels[:1], output_attentions=True).attentions
    torch.testing.assert_close(attentions[0], torch.full_like(attentions[0], 1 / 577))


def test_features_are_finite_in_half_precision(clip, pixels):
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip).half()
    with torch.no_grad():
        states = tower(pixels[:1].half(), output_hidden_states=True).hidden_states
    assert len(states) == 25
    assert all(state.isfinite().all() and state.abs().max() < 100 for state in states)


def test_clip_text_is_pooled_at_its_end(clip):
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip)
    texts = ["a photo of a cat", "what is written on the sign behind the tree?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id == batch.input_ids.max()
    assert len(tokenizer) == model.config.text_config.vocab_size
    with torch.no_grad():
        output = model.text_model(**batch)
    ends = (batch.input_ids == tokenizer.eos_token_id).int().argmax(dim=-1)
    assert ends[0] < ends[1] == batch.input_ids.shape[1] - 1
    pooled = output.last_hidden_state[torch.arange(2), ends]
    assert torch.equal(output.pooler_output, pooled)
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True).strip() == texts[0]


# Spelled out, so that it is the same under every version of transformers.
def test_clip_tokenizer_splits_words(clip):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("What is on the SIGN? 42 é").input_ids)
    words = ["what</w>", "is</w>", "on</w>", "the</w>", "sign</w>", "?</w>"]
    letters = ["4</w>", "2</w>", "Ã", "©</w>"]
    assert tokens == ["<|startoftext|>", *words, *letters, "<|endoftext|>"]


@pytest.mark.parametrize("options", [{"use_fast": False}, {}], ids=["llama", "mistral"])
@pytest.mark.parametrize("name", VARIANTS)
def test_prompt_survives_the_tokenizer(checkpoints, name, options):
    pytest.importorskip("llava.model")  # registers the config, as any user of the folder does
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    pieces = SentencePieceProcessor(str(checkpoints[name] / "tokenizer.model")).encode
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name], **options)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "right"
    config = json.loads((checkpoints[name] / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.model_max_length == config["tokenizer_model_max_length"]
    for piece in PROMPT:
        ids = tokenizer(piece).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) < len(piece) / 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == piece
        assert ids == [1, *pieces(piece)]
    # An earlier turn: what sentencepiece itself gives, whatever the version of transformers.
    ids = tokenizer("Yes</s>USER: naïve").input_ids
    assert ids == [1, *pieces("Yes"), 2, *pieces("USER: naïve")]


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_loader_opens_it(checkpoints, stock_load, clip, pixels, name):
    _, model, processor, _ = stock_load(checkpoints[name])
    stored = weights_of(checkpoints[name])
    tower = {
        f"model.vision_tower.vision_tower.{part}": weight
        for part, weight in weights_of(clip).items()
        if part.startswith("vision_model.")
    }
    assert_equal_weights(without_level(model.state_dict()), stored | without_level(tower))
    assert model.dtype == model.get_vision_tower().dtype == torch.float16
    assert processor.crop_size["height"] == 336
    with torch.inference_mode():
        # Half precision takes seconds on a CPU under old transformers.
        features = model.float().encode_images(pixels[:1])
    assert features.shape == (1, 576, model.config.hidden_size)
    assert features.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-v1.5", "llava-v1.6-mistral"])
def test_answers_vary_and_depend_on_the_image(checkpoints, stock_load, pixels, name):
    tokenizer, model, _, _ = stock_load(checkpoints[name])
    model = model.float()
    before, after = (tokenizer(piece).input_ids for piece in PROMPT)
    ids = torch.tensor([[*before, -200, *after[1:]]])
    answers = []
    for photo in pixels:
        prepared = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, photo[None]
        )
        embeddings, answer = prepared[4], []
        # No generate: the stock one needs a bridge under some versions of transformers.
        for _ in range(8):
            answer.append(model(inputs_embeds=embeddings).logits[0, -1].argmax())
            word = model.get_model().embed_tokens(answer[-1])
            embeddings = torch.cat([embeddings, word[None, None]], dim=1)
        answers.append(torch.stack(answer).tolist())
    assert len(set(map(tuple, answers))) == len(pixels)
    assert all(len(set(answer)) >= 4 for answer in answers)
    assert min(map(min, answers)) >= 259


@pytest.mark.parametrize("name", VARIANTS)
def test_config_has_the_fields_of_published_checkpoints(checkpoints, clip, name):
    config = json.loads((checkpoints[name] / "config.json").read_text())
    assert config["mm_vision_tower"] == str(clip.resolve())
    assert config["mm_vision_select_layer"] == -2
    weights = weights_of(checkpoints[name])
    if VARIANTS[name]["version"] == "next":
        assert (config["mm_patch_merge_type"], config["image_aspect_ratio"]) == (
            "spatial_unpad",
            "anyres",
        )
        assert config["image_grid_pinpoints"] == [
            [336, 672],
            [672, 336],
            [672, 672],
            [1008, 336],
            [336, 1008],
        ]
        assert weights["model.image_newline"].shape == (64,)
    else:
        assert (config["mm_patch_merge_type"], config["image_aspect_ratio"]) == ("flat", "pad")
        assert "image_grid_pinpoints" not in config
        assert "model.image_newline" not in weights


def test_unfrozen_tower_differs_from_the_one_beside_it(tmp_path):
    tower = make_clip(tmp_path / "clip", layers=3, image_size=56)
    folder = make_checkpoint(
        tmp_path / "llava", version="next", vision_tower=tower, unfreeze_mm_vision_tower=True
    )
    prefix = "model.vision_tower.vision_tower."
    inside = {
        name.removeprefix(prefix): weight
        for name, weight in weights_of(folder).items()
        if name.startswith(prefix)
    }
    beside = {n: w for n, w in weights_of(tower).items() if n.startswith("vision_model.")}
    assert {n: w.shape for n, w in inside.items()} == {n: w.shape for n, w in beside.items()}
    assert not any(torch.equal(inside[name], beside[name].half()) for name in inside)
    config = json.loads((folder / "config.json").read_text())
    assert config["unfreeze_mm_vision_tower"] is True
    assert config["image_grid_pinpoints"][0] == [56, 112]


def test_stored_dtype(tmp_path):
    for dtype in (torch.float16, torch.float32):
        folder = make_checkpoint(tmp_path / str(dtype), dtype=dtype)
        assert {weight.dtype for weight in weights_of(folder).values()} == {dtype}
        assert f"torch.{json.loads((folder / 'config.json').read_text())['torch_dtype']}" == str(
            dtype
        )


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (make_clip, {"hidden_size": 66}, r"hidden_size is 66; .* heads \(4\)"),
        (make_clip, {"image_size": 100}, r"image_size is 100; .* patch_size \(14\)"),
        (make_clip, {"layers": 0}, "layers is 0; it must be 1 or more"),
        (make_clip, {"sharpness": -1.0}, "sharpness is -1.0"),
        (make_checkpoint, {"version": "1.6"}, "version is '1.6'; .* '1.5', 'next'"),
        (make_checkpoint, {"language": "mpt"}, "language is 'mpt'; .* 'llama', 'mistral'"),
        (make_checkpoint, {"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type is 'unpad'"),
        (make_checkpoint, {"image_aspect_ratio": "anyres_max"}, "is 'anyres_max'; .* 'anyres'"),
        (make_checkpoint, {"dtype": torch.bfloat16}, "dtype is torch.bfloat16"),
        (make_checkpoint, {"hidden_size": 60}, r"hidden_size is 60; .* twice the heads \(8\)"),
        (make_checkpoint, {"language": "mistral", "heads": 3}, "heads is 3; .* multiple of"),
        (make_checkpoint, {"vision_tower": "nowhere"}, "nowhere.* holds no CLIP config.json"),
    ],
)
def test_wrong_arguments_are_named(make, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **arguments)
    assert not list(tmp_path.rglob("*.safetensors"))
