"""The one `PrunedProcess` of this process: how it begins, and how it refuses.

The startup hook calls `begin`, imports LLaVA and calls `switch_on` of what that gave.
"""

from __future__ import annotations

import importlib
import os

import llava_hvp_startup as startup

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.hook.process import PrunedProcess

USAGE, FAILED = 2, 1  # exit codes: what was asked for is wrong, or could not be done
_current: PrunedProcess | None = None


def begin(command: str) -> PrunedProcess:
    """Read what was asked for, and take our flags out of `sys.argv`; twice is as once.

    Raises OptionError for what cannot be right, before any model is loaded.
    """
    global _current
    if _current is None:
        _current = PrunedProcess(command, config.from_environment(os.environ))
        _current.read_flags()
    return _current


def begin_parsed(request: Request) -> PrunedProcess:
    """As `begin` and `switch_on` where LLaVA's own parser has read our flags (patches/0001).

    Gives the session that there is, if the startup hook was here before.
    """
    global _current
    if _current is None:
        session = PrunedProcess(startup.llava_command(), config.from_environment(os.environ))
        session.take(request)
        session.switch_on()
        _current = session
    return _current


def refuse(error: BaseException) -> int:
    """Say in one line why nothing can be pruned; return the exit code."""
    hidden = isinstance(error, ImportError) and (error.name or "llava").startswith("llava")
    if hidden and not isinstance(error, LlavaHvpError):
        # LLaVA hides the reason behind a later ImportError; our check of versions finds it.
        try:
            importlib.import_module("llava_hvp.hosts.llava")
        except LlavaHvpError as reason:
            error = reason
    known = isinstance(error, LlavaHvpError)
    say(f"error: {error}" if known else f"error: cannot prune: {type(error).__name__}: {error}")
    if _current is not None:
        _current.fails(error)
    return USAGE if isinstance(error, OptionError) else FAILED
