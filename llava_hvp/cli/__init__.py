"""The command `llava-hvp`.

A subcommand is one file: `add` its flags, `parse` them into frozen settings, with every check that
needs nothing loaded, `run` those, and `main`, which is the two in turn. No argparse Namespace goes
past `parse`. Where that grew long, the settings and `parse` lie beside it, as in `bench_settings`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import llava_hvp
from llava_hvp.cli import (
    accuracy,
    bench,
    convert,
    demo_app,
    doctor,
    evaluate,
    methods,
    reproduce,
    run,
    shapes,
    show,
    table,
    tune,
)
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code, 2 for what was asked for wrongly."""
    parser = argparse.ArgumentParser(prog="llava-hvp", description=llava_hvp.__doc__)
    parser.add_argument("--version", action="version", version=llava_hvp.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        run,
        show,
        demo_app,
        evaluate,
        table,
        reproduce,
        shapes,
        convert,
        accuracy,
        bench,
        tune,
        methods,
        doctor,
    ):
        command.add(commands)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    # `passes`: what a command does not know goes to LLaVA's own.
    given = argparse.Namespace(rest=arguments[end + 1 :], passes=False)
    args, unknown = parser.parse_known_args(arguments[:end], given)
    if unknown and not args.passes:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.unknown = unknown
    try:
        return args.main(args)
    except LlavaHvpError as error:
        say(f"error: {error}")
        return 2
