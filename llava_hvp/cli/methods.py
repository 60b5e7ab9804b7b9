"""`llava-hvp methods`: every method with its options and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from llava_hvp.config import BUDGET
from llava_hvp.methods import NONE, list_methods, method_class
from llava_hvp.methods.base import Method


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("methods", help="list the methods and their options")
    parser.set_defaults(main=main)


def main(found: argparse.Namespace) -> int:
    """Print the list."""
    common = [f.name for f in dataclasses.fields(Method)]
    for name in list_methods():
        kind = method_class(name)
        print(f"{name}: {kind.summary}")
        for option in dataclasses.fields(kind):
            if option.name not in common:
                print(f"    --prune-opt {option.name}={option.default}   ({option.type})")
    print("every method: --r-max R or --num-tokens N, and")
    for option in dataclasses.fields(Method):
        if option.name not in BUDGET:
            print(f"    --prune-opt {option.name}={option.default}   ({option.type})")
    print(
        f"{NONE}: unpruned LLaVA, bridged to this transformers and accounted for; takes the flags"
    )
    print("    of any method and uses none of them, for loops over methods")
    return 0
