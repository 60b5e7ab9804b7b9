"""The words of a training command that this transformers knows by another name, or not at all."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence

# What LLaVA's scripts say, and what transformers 4.46 and 5 call it. A share of the steps is a
# number of warm-up steps below one.
_RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}


def named_now(arguments: Sequence[str]) -> list[str]:
    """The arguments of `llava.train.train`, as this release of transformers calls them."""
    kind = importlib.import_module("transformers").TrainingArguments
    known = {field.name for field in dataclasses.fields(kind)}
    renamed = {
        f"--{old}": f"--{new}" for old, new in _RENAMED.items() if old not in known and new in known
    }
    return [_renamed(word, renamed) for word in arguments]


def _renamed(word: str, names: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    return f"{names.get(name, name)}{equals}{value}"


def on_cpu(arguments: Sequence[str]) -> list[str]:
    """The same without a GPU: transformers has to be told, and TF32 is of GPUs only."""
    names = [word.partition("=")[0] for word in arguments]
    rest = list(arguments)
    for at in reversed([i for i, name in enumerate(names) if name == "--tf32"]):
        takes_next = "=" not in rest[at] and not [*rest, "--"][at + 1].startswith("--")
        del rest[at : at + 1 + takes_next]
    return rest if {"--use_cpu", "--no_cuda"} & set(names) else [*rest, "--use_cpu", "True"]
