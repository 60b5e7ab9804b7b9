"""Time to first token, tokens and visual tokens of each `generate`, pruned or not."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from llava_hvp.checkpoints.conversation import IMAGE
from llava_hvp.hosts import host_of
from llava_hvp.pruning.monkeypatch import MonkeyPatcher


@dataclass(frozen=True)
class Call:
    """One call of `generate`; counts are sums over its batch.

    Parameters
    ----------
    first_token : float
        seconds until the first tokens are there, image encoding included
    seconds : float
        of the whole call
    tokens : int
        generated, the end of an answer included, padding after it left out
    prompts, images : int
        of the batch
    kept_tokens, stock_tokens : int
        visual tokens sent, and those that unpruned LLaVA would send
    average_tokens : float
        visual tokens that enter a layer of the language model, averaged over all
    kept_of_stock, average_of_stock, kept_of_patches : float
        the ratios of each image, added up
    vision_tower_dtype, vision_tower_attention : str
        in which the tower runs
    model_dtype : str
        of the language model, as "float16" or "float16 in 4 bit"
    """

    first_token: float
    seconds: float
    tokens: int
    prompts: int
    images: int
    kept_tokens: int
    stock_tokens: int
    average_tokens: float
    kept_of_stock: float
    average_of_stock: float
    kept_of_patches: float
    vision_tower_dtype: str
    vision_tower_attention: str
    model_dtype: str


def measure_all(patches: MonkeyPatcher, on_call: Callable[[Call], None]) -> None:
    """Measure every `generate` of every LLaVA model from now on, until the patches are undone."""
    from llava_hvp.hosts.llava.compat.versions import llava_models

    for kind in llava_models():
        if "generate" in vars(kind):
            patches.replace(kind, "generate", measured(vars(kind)["generate"], on_call))


def measured(generate: Callable[..., Any], on_call: Callable[[Call], None]) -> Callable[..., Any]:
    """LLaVA's `generate(model, inputs, …)`, its result the same; `on_call` is told of each call."""

    @functools.wraps(generate)
    def wrapper(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        pruning = vars(self).get("llava_hvp")
        given = args[0] if args else kwargs.get("images")
        clock = _Clock(self.device)
        processors = [*(kwargs.pop("logits_processor", None) or ()), clock]
        prefill: list[torch.Tensor | int] = []
        # transformers' own model embeds inside, so that what is within it tells the length.
        within = getattr(getattr(self, "model", None), "language_model", self)
        hook = within.register_forward_pre_hook(
            functools.partial(_note_prefill, prefill), with_kwargs=True
        )
        try:
            begun = clock.now()
            output = generate(
                self, inputs, *args, logits_processor=LogitsProcessorList(processors), **kwargs
            )
            ended = clock.now()
        finally:
            hook.remove()
        counts = _counts(self, inputs, kwargs.get("attention_mask"), prefill, given, pruning)
        tower = host_of(self).facts_of(self)
        on_call(
            Call(
                first_token=(clock.first or ended) - begun,
                seconds=ended - begun,
                tokens=_tokens(output, clock.steps, self),
                prompts=len(inputs),
                **counts,
                vision_tower_dtype=tower["vision_tower_dtype"],
                vision_tower_attention=tower["vision_tower_attention"],
                model_dtype=_dtype(self),
            )
        )
        return output

    return wrapper


class _Clock(LogitsProcessor):
    """Leaves all logits as they are, and notes when the first ones came."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first, self.steps = device, 0.0, 0

    def now(self) -> float:
        """The time, when all that was asked of the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.steps:
            self.first = self.now()
        self.steps += 1
        return scores


def _dtype(model: Any) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    bits = [n for n in (4, 8) if getattr(model, f"is_loaded_in_{n}bit", False)]
    return f"{dtype} in {bits[0]} bit" if bits else dtype


def _note_prefill(found: list[Any], module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Length of each row of the first forward: images are tokens among others there."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if found or embeds is None:
        return
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        found.append(mask[:, : embeds.shape[1]].bool().sum(1).cpu())
    else:
        found.append(torch.full((embeds.shape[0],), embeds.shape[1]))


def _counts(
    model: Any, inputs: Any, mask: Any, prefill: list[Any], images: Any, pruning: Any
) -> dict[str, Any]:
    ids = inputs.cpu()
    is_image = ids == IMAGE
    count = int(is_image.sum()) if images is not None else 0
    kept = 0
    if count and prefill:
        text = ~is_image if mask is None else ~is_image & mask.cpu().bool()
        beams = len(prefill[0]) // len(ids)
        kept = int((prefill[0][::beams] - text.sum(1)).sum())
    if pruning is None or not count:
        return {
            "images": count,
            "kept_tokens": kept,
            "stock_tokens": kept,
            "average_tokens": float(kept),
            "kept_of_stock": float(count),
            "average_of_stock": float(count),
            "kept_of_patches": float(count),
        }
    reports = pruning.last
    return {
        "images": count,
        "kept_tokens": sum(r.kept_tokens for r in reports),
        "stock_tokens": sum(r.stock_tokens for r in reports),
        "average_tokens": float(sum(r.average_tokens for r in reports)),
        "kept_of_stock": sum(r.kept_of_stock for r in reports),
        "average_of_stock": sum(r.average_tokens / r.stock_tokens for r in reports),
        "kept_of_patches": sum(r.kept_of_patches for r in reports),
    }


def _tokens(output: Any, steps: int, model: Any) -> int:
    """Tokens generated; a row of a batch that ended early is padded, and padding is no token."""
    rows = getattr(output, "sequences", output)
    if len(rows) == 1:
        return steps
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()), device=rows.device)
    is_end = torch.isin(rows[:, -steps:], ends)
    # Up to the first end, that included.
    return int(((is_end.cumsum(1) - is_end.long()) == 0).sum())
