"""A LLaVA checkpoint as transformers' own classes load it, and back: the same weights, renamed.

Both forms hold the same tensors. transformers' has the vision tower within, a vocabulary with one
more token, which stands for an image, and a processor beside it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_hvp.checkpoints.chat_templates import chat_template
from llava_hvp.checkpoints.form import FAMILIES, is_transformers, read_config
from llava_hvp.checkpoints.processors import (
    SENTENCEPIECE,
    clip_processor,
    swapped_pinpoints,
    write_image_tokenizer,
    write_llama_tokenizer,
    write_processor,
)
from llava_hvp.errors import OptionError
from llava_hvp.files import whole_folder, write_json
from llava_hvp.hosts.hf.host import CLIP

TOWER = "vision-tower"  # folder inside a checkpoint of LLaVA's form
LANGUAGES = {
    "llava_llama": ("llama", "LlavaLlamaForCausalLM"),
    "llava": ("llama", "LlavaLlamaForCausalLM"),
    "llava_mistral": ("mistral", "LlavaMistralForCausalLM"),
}
# LLaVA's form -> transformers', as the published checkpoints have them, which all releases load.
PREFIXES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Since transformers 4.52 models are saved so.
NEWER = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def convert(source: str | Path, target: str | Path, conv_mode: str | None = None) -> Path:
    """Write a checkpoint of either form in the other one; return its folder.

    Parameters
    ----------
    source, target, conv_mode : str | Path | None
        as in `to_transformers` and `from_transformers`

    Raises
    ------
    OptionError
        no LLaVA checkpoint, one of another shape, or a target with something in it
    """
    source = Path(source)
    if is_transformers(source):
        if conv_mode is not None:
            raise OptionError(
                f"--conv-mode {conv_mode}: LLaVA's form has no chat template, its loader goes by "
                "the folder's name: leave it out"
            )
        return from_transformers(source, target)
    return to_transformers(source, target, conv_mode)


def to_transformers(source: str | Path, target: str | Path, conv_mode: str | None = None) -> Path:
    """Write a LLaVA checkpoint as one for `AutoModelForImageTextToText`; return its folder.

    Parameters
    ----------
    source : str | Path
        folder of a LLaVA-1.5 or LLaVA-NeXT checkpoint; its config names the vision tower's folder
    target : str | Path
        a folder that is empty or not there; it is there as a whole or not at all, a processor with
        a chat template included
    conv_mode : str | None
        LLaVA's conversation template that the chat template says; by default what fits the name
        and the language model

    Raises
    ------
    OptionError
        no such checkpoint, one of another shape, or a target with something in it
    """
    with _new(target) as folder:
        _to_transformers(Path(source), folder, conv_mode)
    return Path(target)


def _to_transformers(source: Path, target: Path, conv_mode: str | None) -> None:
    config = _config(source)
    tower = Path(config.get("mm_vision_tower") or "")
    vision = _vision_config(tower)
    family = _family(config, source)
    language, _ = LANGUAGES[config["model_type"]]
    template = chat_template(source.resolve().name, language, conv_mode)
    weights = _weights(source)
    if not any(name.startswith("model.vision_tower.") for name in weights):
        own = {n: w for n, w in _weights(tower).items() if n.startswith("vision_model.")}
        kind = weights["lm_head.weight"].dtype
        weights |= {f"model.vision_tower.vision_tower.{n}": w.to(kind) for n, w in own.items()}
    renamed = {_renamed(name, PREFIXES): weight for name, weight in weights.items()}
    image = write_image_tokenizer(source, target)
    for name in VOCABULARY:
        # As transformers enlarges a vocabulary: what no one trained is the mean of the others.
        mean = renamed[name].float().mean(0, keepdim=True).to(renamed[name].dtype)
        more = max(0, image + 1 - len(renamed[name]))
        renamed[name] = torch.cat((renamed[name], mean.expand(more, -1)))
    rows = len(renamed[VOCABULARY[0]])
    _save(target, renamed)
    text = {k: v for k, v in config.items() if not _is_llavas_own(k)}
    written = {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": FAMILIES[family],
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": config.get("torch_dtype", "float16"),
        "text_config": {**text, "model_type": language, "vocab_size": rows},
        "vision_config": vision,
        CLIP: str(tower),  # has the text encoder, which this form has no place for
    }
    if family == "LlavaNext":
        written["image_grid_pinpoints"] = swapped_pinpoints(config)
    write_json(target / "config.json", written)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    write_processor(target, tower, config, vision, family, template)


def from_transformers(source: str | Path, target: str | Path) -> Path:
    """Write a transformers LLaVA as a checkpoint for LLaVA's own loader; return its folder.

    The loader goes by the name: put `llava` into it, and `mistral` where the language model is one.
    The vision tower goes into a folder inside, by its absolute path, so do not move the result. It
    has no text encoder: transformers' form has none to give.

    Parameters
    ----------
    source, target : str | Path
        as in `to_transformers`

    Raises
    ------
    OptionError
        no such checkpoint, one of another shape, or a target with something in it
    """
    with _new(target) as folder:
        _from_transformers(Path(source), folder, Path(target).resolve())
    return Path(target)


def _from_transformers(source: Path, target: Path, final: Path) -> None:
    """Write to `target`, which will become `final`."""
    config = read_config(source)
    kind, text = config.get("model_type"), config.get("text_config") or {}
    back = {language: (k, arch) for k, (language, arch) in LANGUAGES.items() if k != "llava"}
    if kind not in FAMILIES.values() or text.get("model_type", "llama") not in back:
        raise OptionError(
            f"{source}: model type {kind!r} with a {text.get('model_type')!r} language model is no "
            "LLaVA-1.5 or LLaVA-NeXT of transformers with Llama or Mistral"
        )
    model_type, architecture = back[text.get("model_type", "llama")]
    if not (source / SENTENCEPIECE).is_file():
        raise OptionError(
            f"no {SENTENCEPIECE} in {source}: LLaVA's loader wants the sentencepiece model of the "
            "language model; put that file there"
        )
    names = {_renamed(n, NEWER): w for n, w in _weights(source).items()}
    image = config.get("image_token_index", config.get("image_token_id"))
    for name in VOCABULARY:
        names[name] = names[name][:image].clone()
    side = config["vision_config"]["image_size"]
    # Since transformers 5 the tower is saved without the level that CLIP's own files have.
    tower = {
        "vision_model." + n.removeprefix("vision_tower.").removeprefix("vision_model."): w
        for n, w in names.items()
        if n.startswith("vision_tower.")
    }
    folder = target / TOWER
    folder.mkdir()
    _save(folder, tower)
    vision = {"architectures": ["CLIPVisionModel"], **config["vision_config"]}
    write_json(folder / "config.json", {**vision, "model_type": "clip_vision_model"})
    write_json(folder / "preprocessor_config.json", clip_processor(source, side))
    rest = {n: w for n, w in names.items() if not n.startswith("vision_tower.")}
    _save(target, {_renamed(n, [(b, a) for a, b in PREFIXES]): w for n, w in rest.items()})
    is_next = kind == "llava_next"
    written = {
        **text,
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": image,
        "torch_dtype": config.get("torch_dtype") or config.get("dtype") or "float16",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_tower": str(final / TOWER),
        "use_mm_proj": True,
        "image_aspect_ratio": "anyres" if is_next else "pad",
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
    }
    if is_next:
        pairs = config["image_grid_pinpoints"]
        written["image_grid_pinpoints"] = [[width, height] for height, width in pairs]
    write_json(target / "config.json", written)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    write_llama_tokenizer(source, target)


@contextlib.contextmanager
def _new(target: str | Path) -> Iterator[Path]:
    try:
        with whole_folder(target) as folder:
            yield folder
    except OSError as error:
        raise OptionError(str(error)) from error


def _config(source: Path) -> dict[str, Any]:
    config = read_config(source)
    if config.get("model_type") not in LANGUAGES or "mm_vision_tower" not in config:
        raise OptionError(
            f"{source}: model type {config.get('model_type')!r} is no LLaVA checkpoint with Llama "
            f"or Mistral ({', '.join(LANGUAGES)})"
        )
    return config


def _family(config: dict[str, Any], source: Path) -> str:
    merge, aspect = config.get("mm_patch_merge_type", "flat"), config.get("image_aspect_ratio")
    if config.get("mm_projector_type") != "mlp2x_gelu" or config.get("mm_use_im_start_end"):
        raise OptionError(
            f"{source}: mm_projector_type={config.get('mm_projector_type')!r} and "
            f"mm_use_im_start_end={config.get('mm_use_im_start_end')!r}: transformers' classes "
            "have 'mlp2x_gelu' and no start and end tokens"
        )
    if (merge, aspect) == ("spatial_unpad", "anyres"):
        return "LlavaNext"
    if merge == "flat" and aspect != "anyres":
        return "Llava"
    raise OptionError(
        f"{source}: mm_patch_merge_type={merge!r} with image_aspect_ratio={aspect!r}: "
        "transformers' classes have 'flat' of one tile, and 'spatial_unpad' with 'anyres'"
    )


def _is_llavas_own(key: str) -> bool:
    own = ("architectures", "image_aspect_ratio", "image_grid_pinpoints", "use_mm_proj")
    return key.startswith(("mm_", "tune_mm", "freeze_mm", "unfreeze_mm")) or key in own


def _vision_config(tower: Path) -> dict[str, Any]:
    path = tower / "config.json"
    if not path.is_file():
        raise OptionError(
            f"the checkpoint's mm_vision_tower is {str(tower)!r}, which is no folder here: "
            "download that CLIP, and name its folder there"
        )
    config = json.loads(path.read_text())
    return {**config.get("vision_config", config), "model_type": "clip_vision_model"}


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors, or of the older files of torch."""
    found: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    load: Callable[[Path], Any] = load_file
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        load = _load_torch
    for file in files:
        found |= load(file)
    if not found:
        raise OptionError(f"no weights in {folder}: neither *.safetensors nor pytorch_model*.bin")
    return {n: w for n, w in found.items() if not n.endswith(("position_ids", "inv_freq"))}


def _load_torch(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _renamed(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _save(folder: Path, weights: dict[str, Tensor]) -> None:
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
