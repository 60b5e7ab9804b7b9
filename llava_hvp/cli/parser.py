"""How a subcommand presents itself: a line in the list, what it does, and lines to copy."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 96


def add_command(
    commands: Any, name: str, line: str, more: str = "", examples: Sequence[str] = (), **given: Any
) -> argparse.ArgumentParser:
    """The parser of a new subcommand.

    Parameters
    ----------
    line : str
        what it does, for the list of commands
    more : str
        what else a user wants to know before the options
    examples : Sequence[str]
        commands that run as they stand where `llava-hvp shapes shapes` was run, each of them on
        the page of commands as well; empty for none
    """
    parts = [f"{line[0].upper()}{line[1:]}.", *([more] if more else [])]
    shown = "".join(f"\n  {example}" for example in examples)
    return commands.add_parser(
        name,
        help=line,
        description="\n\n".join(textwrap.fill(part, WIDTH) for part in parts),
        epilog=f"to copy, after llava-hvp shapes shapes:{shown}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **given,
    )
