"""How we speak up inside other people's commands."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """One line on stderr; stdout is the command's own.

    In one piece: unbuffered, `print` writes the end of a line by itself, and the lines of two
    processes run into one.
    """
    sys.stderr.write(f"llava-hvp: {line}\n")
    sys.stderr.flush()
