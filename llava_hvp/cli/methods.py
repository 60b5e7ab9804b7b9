"""`llava-hvp methods`: every method with its options and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import textwrap
from typing import Any

from llava_hvp.cli.parser import add_command
from llava_hvp.methods import NONE, list_methods, method_class
from llava_hvp.methods.base import Method
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.runtime import CLIP_TEXT, PruningConfig, Runtime

PLACES = {
    LanguageMethod.where: "inside the language model; alone, or behind another by --prune-inside, "
    "--inside-r-max R or\n    --inside-num-tokens N, and --inside-opt for --prune-opt:",
}

EXAMPLES = ("llava-hvp methods",)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "methods",
        "list the methods and their options",
        "Of each option its default, in brackets.",
        EXAMPLES,
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the list; it has no settings."""
    return run()


def run() -> int:
    """Print the list; the exit code."""
    common = [f.name for f in dataclasses.fields(Method)]
    kinds = {name: method_class(name) for name in list_methods()}
    for place in dict.fromkeys(kind.where for kind in sorted(kinds.values(), key=_inside)):
        print(PLACES.get(place, f"at the {place}:"))
        for name, kind in kinds.items():
            if kind.where == place:
                print(f"{name}: {kind.summary}")
                _list(kind, [o for o in dataclasses.fields(kind) if o.name not in common])
    print("every method: --r-max R or --num-tokens N, and")
    _list(Runtime, list(dataclasses.fields(Runtime)))
    named = [field for field in dataclasses.fields(PruningConfig) if field.name == CLIP_TEXT]
    print("methods that read the prompt by CLIP, as hiprune++ and cdpruner:")
    _list(PruningConfig, named)
    print(
        f"{NONE}: unpruned LLaVA, bridged to this transformers and accounted for; takes the flags"
    )
    print("    of any method and uses none of them, for loops over methods")
    return 0


def _inside(kind: type[Method]) -> bool:
    return issubclass(kind, LanguageMethod)


def _list(kind: type[Any], options: list[dataclasses.Field[Any]]) -> None:
    for option in options:
        print(f"    --prune-opt {option.name}={option.default}   ({option.type})")
        says = explained(kind, option.name)
        print(textwrap.fill(says, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))


def explained(kind: type[Any], option: str) -> str:
    """What the docstring of a method, or of one that it builds on, says of an option."""
    for each in kind.__mro__:
        lines = inspect.cleandoc(vars(each).get("__doc__") or "").splitlines()
        for number, line in enumerate(lines, start=1):
            # One entry may explain several: `keys, queries : type`.
            if option in line.partition(" : ")[0].split(", ") and not line.startswith(" "):
                described = itertools.takewhile(
                    lambda text: text.startswith("    "), lines[number:]
                )
                return " ".join(text.strip() for text in described)
    return ""
