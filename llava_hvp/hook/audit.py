"""The account that a pruned process gives: a line when it begins, one when it ends, a record.

Beside an answers file lies `ANSWERS.hvp.json`; the launcher finds a report of each process in the
folder that it named.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import platform
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llava_hvp_startup as startup

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError
from llava_hvp.files import write_json
from llava_hvp.methods.base import Method
from llava_hvp.pruning.record import Totals, answers_facts, record_path
from llava_hvp.pruning.report import ImageReport

if TYPE_CHECKING:
    from llava_hvp.pruning.pruning import Pruning

UNPRUNED = 1  # exit code


def leave_report(
    request: Request, command: str, state: str, totals: Totals, reason: str | None = None
) -> None:
    """Tell the launcher, if there is one, how far this process has come.

    state : "started", "done" or "failed"
    """
    if request.reports is None or not Path(request.reports).is_dir():
        return
    report = {
        "state": state,
        "reason": reason,
        "command": command or Path(sys.argv[0]).name,
        "pid": os.getpid(),
        "serves": command in startup.SERVING,
        "counts": totals.as_dict(),
    }
    write_json(Path(request.reports) / f"{os.getpid()}.json", report)


class Account:
    """What one process prunes by `method`, and how it ends.

    Parameters
    ----------
    command : as `llava.eval.model_vqa`; "" for a command that is not LLaVA's own
    versions : what to name in the lines and the record
    """

    def __init__(
        self, command: str, request: Request, method: Method, versions: dict[str, str]
    ) -> None:
        self.command, self.request, self.method = command, request, method
        self.versions = versions
        self.totals = Totals()
        self.unpruned = 0
        self._pid = os.getpid()
        self._begun = self._ended = False
        self._crash: str | None = None
        self._facts: dict[str, str] = {}

    def begin(self) -> None:
        """Say that pruning is on, once, before the first model is loaded."""
        if self._begun:
            return
        self._begun = True
        # "llava" says what it is and where it lies: the place is for the record.
        versions = ", ".join(
            version.partition(" at ")[0] if name == "llava" else f"{name} {version}"
            for name, version in self.versions.items()
        )
        say(f"pruning on: {config.describe(self.method)} ({versions})")
        answers = self._answers()
        if answers is not None:
            record_path(answers).unlink(missing_ok=True)
        self._report("started")
        self._await_the_end()

    def watch(self, pruning: Pruning) -> None:
        """Count what this model prunes from now on."""
        self.begin()
        owner = weakref.ref(pruning)

        def on_record(reports: list[ImageReport]) -> None:
            pruning = owner()
            if not self._facts and pruning is not None:
                self._facts = _facts(pruning.model)
            self.totals.add(reports)

        pruning.on_record = on_record

    def _await_the_end(self) -> None:
        atexit.register(self.finish)
        before = sys.excepthook

        def excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
            self._crash = kind.__name__
            if isinstance(error, LlavaHvpError):
                say(f"error: {error}")
            else:
                before(kind, error, traceback)

        sys.excepthook = excepthook
        # Python sets handlers in the main thread only; a server may load its model in another.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:

            def on_signal(number: int, frame: Any) -> None:
                self._crash = signal.Signals(number).name
                self.finish()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

            signal.signal(signal.SIGTERM, on_signal)

    def finish(self) -> None:
        """Sum up, write the record, and end the process with an error if it went unpruned."""
        if os.getpid() != self._pid or self._ended:
            return
        self._ended = True
        if self.unpruned:
            say(
                f"error: {self.unpruned} images were encoded without pruning, "
                f"{self.totals.images} with it: something builds or calls the vision tower past "
                "LLaVA's loader; do not use these answers as pruned ones"
            )
            self._report("failed", "images were encoded without pruning")
            sys.stdout.flush()
            os._exit(UNPRUNED)  # the only way out of an exit with another code
        if self._crash is None:
            answers = self._answers()
            line = str(self.totals)
            if answers is not None and answers.is_file():
                write_json(record_path(answers), self._record(answers))
                line += f"; record: {record_path(answers)}"
            say(line)
        elif self.totals.images:
            say(f"{self.totals}; stopped by {self._crash}")
        self._report("failed" if self._crash else "done", self._crash)

    def _answers(self) -> Path | None:
        """The answers file of an eval script, which keeps its arguments in a global."""
        if self.command not in startup.EVALUATING:
            return None
        name = getattr(getattr(sys.modules["__main__"], "args", None), "answers_file", None)
        return None if name is None else Path(name).expanduser()

    def _record(self, answers: Path) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "options": dataclasses.asdict(self.method),
            "given": config.to_flags(Request(self.method)),
            "command": [self.command, *sys.argv[1:]],
            "versions": {**self.versions, "python": platform.python_version()},
            **self._facts,
            "counts": self.totals.as_dict(),
            "answers": answers_facts(answers),
        }

    def _report(self, state: str, reason: str | None = None) -> None:
        leave_report(self.request, self.command, state, self.totals, reason)


def _facts(model: Any) -> dict[str, str]:
    from llava_hvp.hosts.llava.tower import tower_facts

    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        **tower_facts(model.get_vision_tower()),
        "device": str(model.device),
        "quantization": str(getattr(model, "quantization_method", None) or "none"),
    }
