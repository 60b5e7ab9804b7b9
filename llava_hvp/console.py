"""How we speak up inside other people's commands."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """One line on stderr; stdout is the command's own.

    In one piece: unbuffered, `print` writes the end of a line by itself, and the lines of two
    processes run into one. Where stderr is closed there is nobody to tell, and the command goes on
    to its exit code.
    """
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):  # as a broken pipe or a closed file gives
        sys.stderr.write(f"llava-hvp: {line}\n")
        sys.stderr.flush()
