"""The account that a pruned process gives: a line when it begins, one when it ends, a record.

Beside an answers file lies `ANSWERS.hvp.json`; the launcher finds a report of each process in the
folder that it named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import platform
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import llava_hvp_startup as startup
import torch

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError, RecordError, UnsupportedModelError
from llava_hvp.files import write_json
from llava_hvp.hook.answers import AnswersFile
from llava_hvp.hook.ending import await_end, await_multiprocessing, await_sigterm, parent_process
from llava_hvp.hook.harness import HarnessResults
from llava_hvp.hosts import host_of
from llava_hvp.methods import NONE
from llava_hvp.pruning.record import UNWRITTEN, Totals, record_path
from llava_hvp.pruning.report import ImageReport
from llava_hvp.runtime import PruningConfig, Runtime

if TYPE_CHECKING:
    from llava_hvp.pruning.pruning import Pruning

FAILED = 1  # exit code
_PAST_US = "images were encoded without pruning"
_REFUSED = "calls of the pruned model were refused"
_WHY = (
    "something builds or calls the vision tower past LLaVA's loader, or past from_pretrained of "
    "transformers' own LLaVA classes"
)


def leave_report(
    request: Request, command: str, state: str, totals: Totals, reason: str | None = None
) -> None:
    """Tell the launcher, if there is one, how far this process has come.

    Parameters
    ----------
    state : str
        "started", "done", "failed", or "unrecorded" where all was done but the record; "forked" for
        a fork, whose end nobody can tell from a kill: it may go by os._exit, and a pool ends its
        workers by SIGTERM

    Raises RecordError where that cannot be written.
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
    path = Path(request.reports) / f"{os.getpid()}.json"
    try:
        write_json(path, report)
    except OSError as error:
        # A name takes no space on a full disk: the launcher learns the reason from it.
        name = errno.errorcode.get(error.errno or 0, "EIO")
        with contextlib.suppress(OSError):
            path.with_suffix(f".{name}{UNWRITTEN}").touch()
        raise RecordError(
            f"{path}: the launcher cannot be told how far this process came: {error.strerror}"
        ) from error


class PruningAudit:
    """What one process prunes, and how it ends.

    Parameters
    ----------
    command : str
        as `llava.eval.model_vqa`; "" for a command that is not LLaVA's own
    pruning : PruningConfig | None
        None for `none`, unpruned LLaVA
    versions : dict[str, str]
        what to name in the lines and the record
    """

    def __init__(
        self,
        command: str,
        request: Request,
        pruning: PruningConfig | None,
        versions: dict[str, str],
    ) -> None:
        self.command, self.request, self.pruning = command, request, pruning
        self.versions = versions
        self.totals = self._no_images()
        self.unpruned = 0
        self._models: weakref.WeakSet[Pruning] = weakref.WeakSet()
        self._has_turn = not request.train_r_max
        self.answers = AnswersFile(self._named_answers)
        self.results = HarnessResults()
        self._pid = os.getpid()
        self._forked = startup.is_fork()
        self._inherited = False
        self._begun = self._ended = self._telling = False
        self._crash: str | None = None
        self._refused: list[LlavaHvpError] = []
        self._facts: dict[str, str] = {}

    def begin(self) -> None:
        """Say that pruning is on, once, before the first model is loaded."""
        self._see_fork()
        if self._begun:
            return
        self._begun = True
        # "llava" says what it is and where it lies: the place is for the record.
        versions = ", ".join(
            version.partition(" at ")[0] if name == "llava" else f"{name} {version}"
            for name, version in self.versions.items()
        )
        pruning = self.pruning
        what = (
            f"pruning on: {pruning}"
            if pruning is not None and pruning.prunes
            else f"pruning off ({pruning or NONE}): every visual token is kept, whatever the budget"
        )
        turns = ", ".join(map(str, self.request.train_r_max))
        say(f"{what}{f', in training by turns {turns}' if turns else ''} ({versions})")
        self._await_the_end()
        self._report("forked" if self._forked else "started")
        self.answers.claim()
        self.results.watch()

    def watch(self, pruning: Pruning) -> None:
        """Count what this model prunes from now on."""
        self.begin()
        self._models.add(pruning)
        owner = weakref.ref(pruning)

        def on_record(reports: list[ImageReport]) -> None:
            pruning = owner()
            if pruning is not None:
                self._refuse_training(pruning.model)
                self._facts = self._facts or _facts(pruning.model)
            self._see_fork()
            self.totals.add(reports)
            if self._forked:
                self._report("forked")

        def on_refused(error: LlavaHvpError) -> None:
            self._see_fork()
            if error not in self._refused:
                self._refused.append(error)

        pruning.on_record, pruning.on_refused = on_record, on_refused

    def take_budget(self, r_max: float) -> None:
        """It is this one's turn, of those that training goes through."""
        for pruning in self._models:
            pruning.take_budget(r_max)
        self._has_turn = True

    def count(self, model: Any, images: int, tokens: int) -> None:
        """Count images that unpruned LLaVA encoded, as `none` asks for."""
        self._see_fork()
        self.begin()
        self._facts = self._facts or _facts(model)
        self.totals.add_unpruned(images, tokens)
        if self._forked:
            self._report("forked")

    def _no_images(self) -> Totals:
        # Calls know nothing of the CLIP that flags named: it is the model's.
        pruning = self.pruning
        known = None if pruning is None else dataclasses.replace(pruning, clip_text=None)
        return Totals(None if known is None else str(known))

    def _refuse_training(self, model: Any) -> None:
        """Whoever trains without LLaVA's own `train` comes here with a pruned model."""
        if not (model.training and torch.is_grad_enabled()):
            return
        if not self._has_turn:
            self._crash = "training without turns"
            raise OptionError(
                f"--train-r-max {','.join(map(str, self.request.train_r_max))}: the turns go by "
                "the steps of transformers' Trainer, and this training has none: give --r-max"
            )
        if not self.request.train:
            self._crash = "training without --prune-train"
            raise OptionError(
                "a pruned model is being trained, and training stays unpruned unless --prune-train "
                "is given too: give it, as in LLAVA_HVP='--prune-method … --prune-train', or set "
                "LLAVA_HVP_DISABLE=1 for this process"
            )

    def add_unpruned(self, images: int) -> None:
        """The stock tower is about to encode images: an error at the end, in a fork right now."""
        self._see_fork()
        self.begin()
        self.unpruned += images
        if self._forked:
            self._report("failed", _PAST_US)
            raise UnsupportedModelError(f"images would be encoded without pruning: {_WHY}")

    def _see_fork(self) -> None:
        """A fork has an account of its own, of which its parent and the launcher hear at once."""
        if os.getpid() == self._pid:
            return
        self._pid, self._forked, self._inherited = os.getpid(), True, self._begun
        self.totals, self.unpruned = self._no_images(), 0
        self._ended, self._crash, self._refused = False, None, []
        self.results.paths.clear()
        if self._begun:
            await_multiprocessing(self.finish)

    def _await_the_end(self) -> None:
        await_end(self.finish, self.fails)
        # A fork has left its report as it went, and dies of the signal: a handler in Python may not
        # run where the signal comes just before a wait for a lock, and its pool would hang.
        if not self._forked:
            await_sigterm(self._stopped)

    def _stopped(self, name: str) -> bool:
        """A signal ends the process, which then dies of it."""
        if self._telling:  # how it ends is just being told, and then it ends
            return False
        self._crash = name
        self.finish()
        return True

    def fails(self, reason: str) -> None:
        """The process ends by an error: there will be no record."""
        self._crash = reason

    def finish(self) -> None:
        """Sum up and write the record; end the process with an error if there can be none."""
        self._see_fork()
        if self._ended or (self._inherited and not self.totals.images and not self.unpruned):
            return
        self._ended = self._telling = True
        try:
            self._tell()
        finally:
            self._telling = False

    def _tell(self) -> None:
        if self.unpruned:
            done = "would have been" if self._forked else "were"
            say(
                f"error: {self.unpruned} images {done} encoded without pruning, "
                f"{self.totals.images} with it: {_WHY}; do not use these answers as pruned ones"
            )
            self._end("failed", _PAST_US)
        if self._crash is not None:
            if self.totals.images:
                say(f"{self._summary()}; stopped by {self._crash}")
            # How multiprocessing ends the workers of a pool, when they are done.
            is_dismissed = self._crash == "SIGTERM" and parent_process() is not None
            with contextlib.suppress(RecordError):  # it fails as it is, and has said why
                self._report(*(("done",) if is_dismissed else ("failed", self._crash)))
            return
        if self._refused:
            say(
                f"error: {len(self._refused)} calls of the pruned model were refused, and their "
                f"caller went on ({self._refused[0]}): answers are missing or empty"
            )
            self._end("failed", _REFUSED)
        try:
            say(f"{self._summary()}{self._write_record()}")
        except RecordError as error:
            say(f"error: {error}")
            self._end("unrecorded", str(error))
        try:
            self._report("done")
        except RecordError as error:
            say(f"error: {error}")
            self._end()

    def _end(self, state: str | None = None, reason: str | None = None) -> NoReturn:
        """Leave with an exit code that says that something is wrong."""
        if state is not None:
            with contextlib.suppress(RecordError):
                self._report(state, reason)
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(FAILED)  # the only way out of an exit with another code

    def _summary(self) -> str:
        if self.pruning is not None:
            return str(self.totals)
        return f"images encoded unpruned: {self.totals.images}"

    def _write_record(self) -> str:
        """Where the record of the answers lies, in words; raises RecordError if it cannot."""
        if self.results.paths:
            return self.results.write_records(self.record())
        facts, answers = self.answers.facts(), self.answers.path
        if facts is None or answers is None:
            is_there = answers is not None and answers.is_file()
            return f"; no record: this process did not write {answers}" if is_there else ""
        path = record_path(answers)
        try:
            write_json(path, {**self.record(), "answers": facts})
        except OSError as error:
            raise RecordError(
                f"{path}: the record cannot be written: {error.strerror}. The answers in {answers} "
                "are complete, and stand without a record"
            ) from error
        return f"; record: {path}"

    def _named_answers(self) -> Path | None:
        """The answers file of an eval script, which keeps its arguments in a global.

        A fork of that process has it too, and leaves it to its parent.
        """
        if self.command not in startup.EVALUATING or self._inherited:
            return None
        name = getattr(getattr(sys.modules["__main__"], "args", None), "answers_file", None)
        return None if name is None else Path(name).expanduser()

    def record(self) -> dict[str, Any]:
        """What was asked, on what, and what came of it."""
        pruning = self.pruning
        return {
            "method": NONE if pruning is None else pruning.spec,
            "options": None if pruning is None else pruning.options,
            "tiling": (Runtime() if pruning is None else pruning.runtime).tiling,
            "given": config.to_flags(self._asked()),
            "command": [self.command, *sys.argv[1:]],
            "versions": {**self.versions, "python": platform.python_version()},
            **self._facts,
            "counts": self.totals.as_dict(),
        }

    def _asked(self) -> Request:
        """What of the request says how images are pruned."""
        pruning = self.pruning
        turns = self.request.train_r_max
        return Request(pruning, unpruned=pruning is None, train_r_max=turns)

    def _report(self, state: str, reason: str | None = None) -> None:
        leave_report(self.request, self.command, state, self.totals, reason)


def _facts(model: Any) -> dict[str, str]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        **host_of(model).facts_of(model),
        "device": str(model.device),
        "quantization": str(getattr(model, "quantization_method", None) or "none"),
    }
