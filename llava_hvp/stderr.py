"""How we speak up inside other people's commands."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """One line on stderr; stdout is the command's own."""
    print(f"llava-hvp: {line}", file=sys.stderr, flush=True)
