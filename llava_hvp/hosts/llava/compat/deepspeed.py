"""What LLaVA's training needs under a DeepSpeed newer than the one it was written for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_hvp.encoder.partitioned import is_partitioned
from llava_hvp.errors import OptionError
from llava_hvp.hosts.llava.compat.versions import transformers_version
from llava_hvp.pruning.monkeypatch import MonkeyPatcher

# What is saved alone, by a function that imports DeepSpeed first.
_SAVED_ALONE = ("--tune_mm_mlp_adapter", "--lora_enable")
_BY_DEEPSPEED = re.compile(r"^def maybe_zero_3\(.*\):\n +from deepspeed", re.M)


def check_saving(arguments: Sequence[str]) -> None:
    """Raise OptionError for a training that LLaVA could not save at its end, before it begins.

    Its script imports DeepSpeed to save a projector or adapters alone, in one process too, unless
    patches/0008 is applied.
    """
    alone = [flag for flag in _SAVED_ALONE if _is_on(arguments, flag)]
    if not alone or importlib.util.find_spec("deepspeed") is not None:
        return
    llava = importlib.util.find_spec("llava")
    script = Path(llava.origin or "").parent / "train" / "train.py" if llava else None
    if script is not None and script.is_file() and _BY_DEEPSPEED.search(script.read_text()):
        raise OptionError(
            f"{alone[0]}: LLaVA imports DeepSpeed to save what was trained, in one process too, "
            "and it is missing: pip install 'llava-hvp[deepspeed]'"
        )


def _is_on(arguments: Sequence[str], flag: str) -> bool:
    """Whether a switch of LLaVA's training script is given, and not as False."""
    words = [*arguments, "--"]
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == flag:
            value = value if equals else words[at + 1]
            return value.lower() not in ("false", "f", "no", "n", "0")
    return False


def bridge_deepspeed(patches: MonkeyPatcher) -> None:
    """Add to `patches` what LLaVA's trainer needs with DeepSpeed; nothing where there is none.

    - DeepSpeed leaves out parameter groups that are empty, as `--mm_projector_lr` makes them, and
      the schedule that was made of all of them no longer fits.
    - A projector that LLaVA makes for a plain language model is float32, and stays so under ZeRO-3.
    - transformers 4.37 makes a fraction of a bucket's size, which has to be whole now.
    - peft keeps adapters of a half-precision model in float32, and ZeRO-3 takes one dtype only; the
      peft that LLaVA was written for gave them the model's.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return
    trainer = importlib.import_module("transformers.trainer").Trainer
    patches.replace(trainer, "__init__", _leaving_out_empty_groups(trainer.__init__))
    integration = importlib.import_module("transformers.integrations.deepspeed")
    is_zero3 = integration.is_deepspeed_zero3_enabled
    core = importlib.import_module("llava.model.llava_arch").LlavaMetaModel
    making = core.initialize_vision_modules
    patches.replace(core, "initialize_vision_modules", _with_one_dtype(making, is_zero3))
    if transformers_version() < (4, 46):
        config = integration.HfTrainerDeepSpeedConfig
        patches.replace(config, "fill_only", _with_whole_sizes(config.fill_only))
    try:
        peft = importlib.import_module("peft")
    except ImportError:  # missing, or too new for this transformers
        return
    stock = peft.get_peft_model
    if "autocast_adapter_dtype" in inspect.signature(stock).parameters:
        patches.replace(peft, "get_peft_model", _in_the_models_dtype(stock, is_zero3))


def _leaving_out_empty_groups(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        create = self.create_optimizer

        def create_optimizer(*args: Any) -> Any:
            optimizer = create(*args)
            if self.is_deepspeed_enabled:
                # What stands for an optimizer of DeepSpeed's own configuration has no groups.
                groups = getattr(optimizer, "param_groups", [])
                groups[:] = [group for group in groups if group["params"]]
            return optimizer

        self.create_optimizer = create_optimizer

    return init


def _with_one_dtype(
    stock: Callable[..., None], is_zero3: Callable[[], bool]
) -> Callable[..., None]:
    @functools.wraps(stock)
    def initialize_vision_modules(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if is_zero3() and not any(map(is_partitioned, self.mm_projector.parameters())):
            self.mm_projector.to(self.dtype)

    return initialize_vision_modules


def _with_whole_sizes(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def fill_only(self: Any, key: str, value: Any) -> None:
        stock(self, key, int(value) if key.endswith("_bucket_size") else value)

    return fill_only


def _in_the_models_dtype(
    stock: Callable[..., Any], is_zero3: Callable[[], bool]
) -> Callable[..., Any]:
    @functools.wraps(stock)
    def get_peft_model(*args: Any, **kwargs: Any) -> Any:
        if is_zero3():
            kwargs.setdefault("autocast_adapter_dtype", False)
        return stock(*args, **kwargs)

    return get_peft_model
