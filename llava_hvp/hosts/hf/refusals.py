"""What a pruned call cannot take: refused in a line, before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llava_hvp.errors import UnsupportedModelError

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # shortened with the ids


def check_arguments(given: dict[str, Any], config: Any) -> None:
    """Raise UnsupportedModelError for arguments of a forward pass or of `generate` with images."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if given.get("inputs_embeds") is not None:
        raise _refused("inputs_embeds together with pixel_values", "give input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise _refused("pixel_values without input_ids", "give the ids that the processor makes")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise _refused(
            f"an attention_mask of shape {shape}, whose columns cannot be told from its ids",
            "give one of (batch, tokens)",
        )
    check_videos(given)
    check_encoded(given)
    check_settings(given, config)
    for name, value in given.items():
        if name in ("input_ids", "attention_mask", "labels", "position_ids", *PER_TOKEN):
            continue
        if isinstance(value, Tensor) and value.shape == ids.shape:
            raise _refused(f"{name} of the ids' shape", "leave it out")
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise _refused(
            "logits_to_keep as indices of the long prompt", "give a number of last columns"
        )


def check_settings(given: dict[str, Any], config: Any) -> None:
    """Raise UnsupportedModelError for features other than the config's."""
    for name in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"):
        wanted = given.get(name)
        if wanted is not None and wanted != getattr(config, name, None):
            raise _refused(
                f"{name}={wanted!r}, where the config has {getattr(config, name, None)!r}",
                f"set the config's {name} before prune(model, method)",
            )


def check_videos(given: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for videos, which are not pruned."""
    if given.get("pixel_values_videos") is not None:
        raise _refused("pixel_values_videos", "give the frames as images, or unprune(model) first")


def check_encoded(given: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for features that come from elsewhere, and are not pruned."""
    encoded = given.get("mm_encoder_outputs")
    if encoded and any(output is not None for output in encoded.values()):
        raise _refused("mm_encoder_outputs, encoded elsewhere and not pruned", "give pixel_values")


def filled_cache() -> UnsupportedModelError:
    """The error for images, or a whole conversation, beside a cache, where positions stay."""
    return _refused(
        "images or a whole conversation with a filled past_key_values on Qwen2.5-VL",
        "begin with an empty cache",
    )


def check_generation(given: dict[str, Any], configs: list[Any]) -> None:
    """Raise UnsupportedModelError for ways to generate that run past the pruned prompt.

    Parameters
    ----------
    configs : list[Any]
        generation configs in force, the more important first
    """
    for name, remedy in (
        ("assistant_model", "generate without it"),
        ("prompt_lookup_num_tokens", "generate without it"),
        ("prefill_chunk_size", "leave it out: a pruned prompt is short"),
        ("custom_generate", "generate without it"),
        ("assistant_early_exit", "generate without it"),
        ("use_mtp", "generate without it"),
        ("dola_layers", "generate without it"),
        ("penalty_alpha", "generate without it"),
    ):
        if setting(name, given, configs):
            raise _refused(f"{name} in generate", remedy)


def setting(name: str, given: dict[str, Any], configs: list[Any]) -> Any:
    """An option of generation, by argument or config; None where nobody set it."""
    found = (given.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def _refused(what: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"a pruned model does not take {what}: {remedy}")
