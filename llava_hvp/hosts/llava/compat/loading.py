"""The stock loader under newer transformers: towers inside the checkpoint, quantised weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch

from llava_hvp.hosts.llava.compat.versions import llava_models, transformers_version
from llava_hvp.pruning.monkeypatch import MonkeyPatcher

TOWER = "model.vision_tower.vision_tower."
DTYPE_SINCE = (4, 56)
BROUGHT_LATER = ("model.mm_projector", "model.vision_tower")


def bridge_loading(patches: MonkeyPatcher) -> None:
    """Add to `patches` what the stock loader needs under this transformers."""
    if transformers_version() >= (5, 0):
        clip_encoder = importlib.import_module("llava.model.multimodal_encoder.clip_encoder")
        patches.replace(clip_encoder, "CLIPVisionModel", LateCLIPVisionModel)
    for kind in llava_models():
        stock = kind.from_pretrained.__func__  # type: ignore[attr-defined]
        patches.replace(kind, "from_pretrained", classmethod(_loading(stock)))
        if transformers_version() >= DTYPE_SINCE:
            patches.replace(kind.config_class, "torch_dtype", _DTYPE)  # type: ignore[attr-defined]


# The training script sets `model.config.torch_dtype`, which complains as the argument does.
_DTYPE = property(
    lambda config: config.dtype, lambda config, dtype: setattr(config, "dtype", dtype)
)


class LateCLIPVisionModel:
    """Stands in for `CLIPVisionModel` where LLaVA builds its tower.

    While transformers 5 builds the LLaVA model on the meta device, nested loading is refused; the
    tower is then made without weights, which the LLaVA checkpoint brings.
    """

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        if torch.empty(0).device.type == "meta":
            tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(name))
        else:
            tower = CLIPVisionModel.from_pretrained(name, **kwargs)
        tower.register_load_state_dict_pre_hook(_without_level)
        return tower


def _without_level(tower: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take the names of published checkpoints: transformers 5 has no `vision_model` level.

    `non_lora_trainables.bin` goes through `load_state_dict(strict=False)`, which would leave a
    trained tower out without a word.
    """
    for key in [key for key in state if key.startswith(f"{prefix}vision_model.")]:
        state[prefix + key.removeprefix(f"{prefix}vision_model.")] = state.pop(key)


def _loading(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained` that takes LLaVA's quantisation flags and makes up no weights.

    What the LLaVA checkpoint does not hold of the tower comes from the tower's own checkpoint.
    Stock would go on with uninitialised memory (transformers 4) or random weights (5), silently.
    """

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs, dtype = _named_now(_quantisation(kwargs)), torch.get_default_dtype()
        try:
            model, report = stock(cls, *args, output_loading_info=True, **kwargs)
        except BaseException:
            torch.set_default_dtype(dtype)  # transformers 4.37 leaves the checkpoint's
            raise
        missing = [key for key in report["missing_keys"] if key.startswith(TOWER)]
        if missing:
            _fill(model.get_vision_tower(), {key.removeprefix(TOWER) for key in missing})
        return (model, report) if wants_report else model

    return from_pretrained


def _named_now(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` gets, with `torch_dtype` called as this release wants.

    Releases that say `dtype` complain about the old name; None asks for nothing under either.
    """
    if transformers_version() < DTYPE_SINCE or arguments.get("torch_dtype") is None:
        return arguments
    others = {name: value for name, value in arguments.items() if name != "torch_dtype"}
    if others.get("dtype") is None:  # transformers' own rule where both are given
        others["dtype"] = arguments["torch_dtype"]
    return others


def _fill(tower: Any, missing: set[str]) -> None:
    """Load weights of the tower from its own checkpoint."""
    from transformers import CLIPVisionModel

    own = CLIPVisionModel.from_pretrained(tower.vision_tower_name)
    if any(_is_packed(layer) for layer in tower.vision_tower.modules()):
        # Packed layers take no weights; LLaVA-1.5 has its tower in float beside them too.
        tower.vision_tower = own.to(tower.device, torch.float16).requires_grad_(False)
        return
    weights = {key: value for key, value in own.state_dict().items() if key in missing}
    tower.vision_tower.load_state_dict(weights, strict=False)


def _is_packed(layer: object) -> bool:
    return type(layer).__module__.split(".")[0] == "bitsandbytes"


def _quantisation(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` gets, with `load_in_4bit` and `load_in_8bit` as every release wants.

    - Stock passes the flag for 4 bits beside a config: transformers 4.57 refuses both. Bare flags
      are unknown to 5. A flag that contradicts the config stays, to be refused.
    - Transformers 5 takes the checkpoint's dtype where 4 took float16, that of the images.
    - A config beside the checkpoint means that this is the base of a LoRA or projector
      checkpoint: what those bring by `load_state_dict` stays in float, since packed layers take
      no weights.
    """
    flags = {name: bool(arguments.get(name)) for name in ("load_in_4bit", "load_in_8bit")}
    if not any(flags.values()):
        return arguments
    from transformers import BitsAndBytesConfig

    config = arguments.get("quantization_config")
    if config is None:
        config, arguments = BitsAndBytesConfig.from_dict(
            flags, return_unused_kwargs=True, **arguments
        )
    agreed = {name for name, flag in flags.items() if flag == getattr(config, name, False)}
    if arguments.get("config") is not None and not config.llm_int8_skip_modules:
        config = copy.copy(config)
        config.llm_int8_skip_modules = ["lm_head", *BROUGHT_LATER]
    others = {name: value for name, value in arguments.items() if name not in agreed}
    if not {"dtype", "torch_dtype"} & others.keys():
        others["torch_dtype"] = torch.float16
    return others | {"quantization_config": config}
