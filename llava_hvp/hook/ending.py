"""The ways in which a process ends, each of which is to be told before."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, RecordError


def await_end(finish: Callable[[], None], fails: Callable[[str], None]) -> None:
    """Finish at an exit, and hear before it of an error that nobody caught.

    Parameters
    ----------
    fails : Callable[[str], None]
        told the error's reason
    """
    atexit.register(finish)
    await_multiprocessing(finish)
    before = sys.excepthook

    def excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
        fails(str(error) if isinstance(error, RecordError) else kind.__name__)
        if isinstance(error, LlavaHvpError):
            say(f"error: {error}")
        else:
            before(kind, error, traceback)

    sys.excepthook = excepthook


def await_multiprocessing(finish: Callable[[], None]) -> None:
    """Its children run what is registered there, and nothing that is registered in atexit."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and parent_process() is not None:
        util.Finalize(None, finish, exitpriority=0)


def await_sigterm(stopped: Callable[[str], bool]) -> None:
    """Tell of SIGTERM and die of it, where nobody handles it.

    Parameters
    ----------
    stopped : Callable[[str], bool]
        called with the signal's name; whether to die now
    """
    # Python sets handlers in the main thread only; a server may load its model in another.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def on_signal(number: int, frame: Any) -> None:
        if stopped(signal.Signals(number).name):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, on_signal)
    os.register_at_fork(after_in_child=functools.partial(_without, on_signal))


def parent_process() -> Any:
    """The parent of a child of multiprocessing, by fork or not; None for other processes."""
    process = sys.modules.get("multiprocessing.process")
    return None if process is None else process.parent_process()


def _without(handler: Any) -> None:
    """Die of SIGTERM again where this handler was inherited."""
    if signal.getsignal(signal.SIGTERM) is handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
