"""`--model_args` of lmms-eval <-> one PruningConfig; lmms-eval itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.errors import OptionError
from llava_hvp.methods import NONE, list_methods
from llava_hvp.options import read_option, unpruned
from llava_hvp.runtime import BUDGET, CLIP_TEXT, INSIDE, JOINED, PruningConfig
from llava_hvp.tuned import load_method

# Arguments of the model that are no options of a method.
OTHERS = (
    *("pretrained", "model_base", "conv_template", "device", "device_map", "dtype"),
    *("batch_size", "max_batch_size", "load_4bit", "load_8bit"),
)
SECOND, FROM, TOWER = "prune_inside", "prune_from", "prune_tower"


def pruning_of(name: str | None, options: Mapping[str, Any]) -> PruningConfig | None:
    """The pruning of `prune_method=NAME,r_max=0.5,layers=7+8+9`, None for LLaVA without us.

    With `prune_inside=fastv,inside_r_max=0.5,inside_layer=3` of two methods.

    Raises OptionError.
    """
    if FROM in options:
        beside = [key for key in options if key != FROM] + ["prune_method"] * (name is not None)
        if beside:
            raise OptionError(f"{FROM} and {beside[0]} exclude each other: give one of them")
        return load_method(options[FROM])
    if name is None:
        if options:
            raise OptionError(
                f"unknown argument {next(iter(options))!r}: options of a method go with "
                f"prune_method, one of {', '.join((*list_methods(), NONE))}; others are "
                + ", ".join(OTHERS)
            )
        return None
    second = options.get(SECOND)
    if second is not None:
        config.check_pair(name, second)
    spec = JOINED.join(filter(None, (name, second)))
    given = {}
    for key, value in options.items():
        if key in (SECOND, TOWER):
            continue
        is_tuple = isinstance(value, str) and key != CLIP_TEXT
        text = value.replace("+", ",") if is_tuple else str(value)
        is_budget = key.removeprefix(INSIDE) in BUDGET
        given[key] = value if is_budget else read_option(spec, f"{key}={text}")[1]
    if name == NONE:
        return unpruned(given)
    return replace(PruningConfig.of(spec, **given), tower=options.get(TOWER))


def model_args(pretrained: str, pruning: PruningConfig | None) -> str:
    """What `pruning_of` reads back, for a command line."""
    pairs = [("pretrained", pretrained)]
    if pruning is not None:
        flags = config.to_flags(Request(pruning))
        pairs.append(("prune_method", flags[1]))
        for flag, value in zip(flags[2::2], flags[3::2], strict=True):
            key, _, text = value.partition("=") if flag.endswith("-opt") else (flag[2:], "", value)
            key = INSIDE * (flag == "--inside-opt") + key
            text = text.strip("()").rstrip(",").replace(", ", "+")
            pairs.append((key.replace("-", "_"), text))
    return ",".join(f"{key}={value}" for key, value in pairs)
