"""What `llava.train.train` needs under newer transformers than the one it was written for.

Pruning in training needs nothing of this: `builder.install` prunes whatever model the script makes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llava_hvp.hosts.llava.compat.deepspeed import bridge_deepspeed
from llava_hvp.hosts.llava.compat.versions import check_versions, llava_models, transformers_version
from llava_hvp.pruning.monkeypatch import MonkeyPatcher

# What llava_trainer imports from transformers.trainer, and where releases without them have it.
_MOVED = {
    "ALL_LAYERNORM_LAYERS": "transformers.pytorch_utils",
    "get_parameter_names": "transformers.trainer_pt_utils",
    "has_length": "transformers.trainer_utils",
    "is_sagemaker_mp_enabled": "transformers.utils",
}


def bridge_training(patches: MonkeyPatcher) -> None:
    """Add to `patches` what the stock training script needs under this transformers.

    To be called before `llava.train` is imported, which it does not import itself. Bridged, where
    the versions need it:

    - a peft that is too new for transformers stops the import of its trainer: it then counts as
      missing (LoRA still reports it);
    - an accelerate that is too new for transformers 4.37's trainer;
    - names that left `transformers.trainer`;
    - `Trainer(tokenizer=…)`, now `processing_class`;
    - the sampler's new argument and the checkpoint's old one;
    - `torch_dtype=None`, which meant float32 and now means the checkpoint's: Adam in float16;
    - what a newer DeepSpeed asks for, see `bridge_deepspeed`.

    Raises
    ------
    UnsupportedVersionError
        this LLaVA or transformers is not supported
    """
    check_versions()
    utils = importlib.import_module("transformers.utils.import_utils")
    if getattr(utils, "_peft_available", False) and not _imports("peft"):
        patches.replace(utils, "_peft_available", False)
    trainer = importlib.import_module("transformers.trainer")
    for name, module in _MOVED.items():
        if not hasattr(trainer, name):
            patches.replace(trainer, name, getattr(importlib.import_module(module), name))
    if transformers_version() < (4, 38):
        accelerator = trainer.Accelerator
        if "dispatch_batches" not in inspect.signature(accelerator.__init__).parameters:
            patches.replace(trainer, "Accelerator", _takes_batches(accelerator))
    bridge_deepspeed(patches)
    if transformers_version() < (4, 46):
        return
    stock = trainer.Trainer
    patches.replace(stock, "__init__", _takes_older(stock.__init__))
    if "metrics" not in inspect.signature(stock._save_checkpoint).parameters:
        patches.replace(stock, "_save_checkpoint", _takes_metrics(stock._save_checkpoint))
    if transformers_version() >= (5, 0):
        for kind in llava_models():
            loader = kind.from_pretrained.__func__  # type: ignore[attr-defined]
            patches.replace(kind, "from_pretrained", classmethod(_float32_unless_told(loader)))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _takes_batches(accelerator: Callable[..., Any]) -> Callable[..., Any]:
    """The two arguments that accelerate 1.0 gathered in a configuration."""

    @functools.wraps(accelerator)
    def make(*, dispatch_batches: Any, split_batches: bool, **kwargs: Any) -> Any:
        from accelerate.utils import DataLoaderConfiguration

        loading = DataLoaderConfiguration(
            dispatch_batches=dispatch_batches, split_batches=split_batches
        )
        return accelerator(dataloader_config=loading, **kwargs)

    return make


def _takes_older(stock: Callable[..., None]) -> Callable[..., None]:
    """`Trainer.__init__` for a subclass written for the older one."""

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        stock(self, *args, **kwargs)
        sampler = self._get_train_sampler
        if not inspect.signature(sampler).parameters:
            # The dataset that it is given now is the trainer's own, which LLaVA's reads.
            self._get_train_sampler = lambda *dataset: sampler()

    return init


def _takes_metrics(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def save(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        stock(self, model, trial)

    return save


def _float32_unless_told(loader: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loader)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if "torch_dtype" in kwargs and kwargs["torch_dtype"] is None:
            kwargs = {**kwargs, "torch_dtype": None, "dtype": kwargs.get("dtype") or torch.float32}
        return loader(cls, *args, **kwargs)

    return from_pretrained
