"""Options as text: KEY=VALUE of one method or two, and what `none` is beside options."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods, method_class
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import (
    BUDGET,
    CLIP_TEXT,
    INSIDE,
    RUNTIME_OPTIONS,
    PruningConfig,
    Runtime,
    method_classes,
    options_of,
)

LONGEST_VALUE = 1000  # characters; 60 layers are 200


def read_option(spec: str, text: str) -> tuple[str, Any]:
    """Name and value of KEY=VALUE, of one method or two or their Runtime; raises OptionError."""
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise OptionError(f"--prune-opt {shown(text)}: give KEY=VALUE, as patch_merge=spatial")
    if len(value) > LONGEST_VALUE:
        raise OptionError(
            f"--prune-opt {shown(text)}: give a value of at most {LONGEST_VALUE} characters"
        )
    first, *second = (Unpruned,) if spec == NONE else method_classes(spec)
    types = {f.name: str(f.type) for each in (first, Runtime) for f in dataclasses.fields(each)}
    types |= {INSIDE + f.name: str(f.type) for each in second for f in dataclasses.fields(each)}
    types[CLIP_TEXT] = "str"
    return key, _value(value.strip(), types.get(key, ""))


def _value(text: str, kind: str) -> Any:
    """A Python literal where it is one (numbers, None, `7,8,9`), else the text itself.

    Parameters
    ----------
    kind : str
        the option's annotation, since "none" is a word to some and None to others
    """
    if kind == "str":  # one of some words, of which a number may be one
        return text
    known = {"true": True, "false": False} | ({"none": None} if "None" in kind else {})
    if text.lower() in known:
        return known[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # the last three of a dict of lists, and of deep nesting
    is_one = not isinstance(value, (tuple, list))
    return (value,) if is_one and value is not None and "tuple" in kind else value


def unpruned(options: Mapping[str, Any]) -> PruningConfig | None:
    """What `none` is beside these options: None for LLaVA without us.

    By a tiling or packing of its own LLaVA is unpruned in that protocol, as its pruned neighbours
    in a loop over methods are. The other options are taken and not used. Raises OptionError for
    options that no method has, or a wrong value of a budget or a Runtime.
    """
    kinds = [method_class(name) for name in list_methods()]
    known = {option for kind in kinds for option in options_of(kind)}
    for option in options:
        if option not in known:
            raise OptionError(f"{NONE}: unknown option {option!r}: no method has it")
    Unpruned(**{name: value for name, value in options.items() if name in BUDGET})
    given = Runtime(**{name: options[name] for name in RUNTIME_OPTIONS if name in options})
    if given.tiling == "stock" and given.packs_as_stock:
        return None
    own = Runtime(tiling=given.tiling, patch_merge=given.patch_merge, newline=given.newline)
    return PruningConfig(Unpruned(), own)
