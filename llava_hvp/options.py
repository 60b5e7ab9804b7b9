"""Options as text: KEY=VALUE of one method or two, and what `none` takes without a use for it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods, method_class
from llava_hvp.methods.base import Method
from llava_hvp.runtime import BUDGET, INSIDE, Runtime, method_classes, options_of

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
    first, *second = (_Unused,) if spec == NONE else method_classes(spec)
    types = {f.name: str(f.type) for each in (first, Runtime) for f in dataclasses.fields(each)}
    types |= {INSIDE + f.name: str(f.type) for each in second for f in dataclasses.fields(each)}
    return key, _value(value.strip(), types.get(key, ""))


def _value(text: str, kind: str) -> Any:
    """A Python literal where it is one (numbers, None, `7,8,9`), else the text itself.

    Parameters
    ----------
    kind : str
        the option's annotation, since "none" is a word to some and None to others
    """
    known = {"true": True, "false": False} | ({"none": None} if "None" in kind else {})
    if text.lower() in known:
        return known[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # the last three of a dict of lists, and of deep nesting
    is_one = not isinstance(value, (tuple, list))
    return (value,) if is_one and value is not None and "tuple" in kind else value


@dataclass(frozen=True, kw_only=True)
class _Unused(Method):
    """The budget beside `none`."""

    name: ClassVar[str] = NONE
    summary: ClassVar[str] = "unpruned LLaVA"
    roles: ClassVar[tuple[str, ...]] = ()
    listed: ClassVar[bool] = False


def check_unused(options: Mapping[str, Any]) -> None:
    """Raise OptionError for options beside `none` that no method has, or a wrong budget.

    All others are taken though `none` uses none of them: a loop over methods gives it theirs.
    """
    kinds = [method_class(name) for name in list_methods()]
    known = {option for kind in kinds for option in options_of(kind)}
    for option in options:
        if option not in known:
            raise OptionError(f"{NONE}: unknown option {option!r}: no method has it")
    _Unused(**{name: value for name, value in options.items() if name in BUDGET})
