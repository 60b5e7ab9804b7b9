"""A process that was asked to prune, from the import of LLaVA to its exit.

The startup hook calls `begin`, imports LLaVA and calls `switch_on`. From then on either images are
pruned or the process ends with an error: silence is not among the outcomes.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import importlib
import os
import platform
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llava_hvp_startup as startup

import llava_hvp
from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.errors import LlavaHvpError, OptionError, UnsupportedModelError
from llava_hvp.record import Totals, answers_facts, record_path, write_json
from llava_hvp.report import ImageReport

if TYPE_CHECKING:
    from llava_hvp.host.pruning import Pruning

USAGE, FAILED = 2, 1  # exit codes: what was asked for is wrong, or could not be done
_current: Session | None = None


def begin(command: str) -> Session:
    """Read what was asked for, and take our flags out of `sys.argv`.

    Raises OptionError for what cannot be right, before any model is loaded.
    """
    global _current
    _current = session = Session(command, config.from_environment(os.environ))
    session.read_flags()
    return session


def begin_parsed(request: Request) -> Session:
    """As `begin` and `switch_on` where LLaVA's own parser has read our flags (patches/0001).

    Gives the session that there is, if the startup hook was here before.
    """
    global _current
    if _current is None:
        session = Session(startup.llava_command(), config.from_environment(os.environ))
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
            importlib.import_module("llava_hvp.host")
        except LlavaHvpError as reason:
            error = reason
    known = isinstance(error, LlavaHvpError)
    say(f"error: {error}" if known else f"error: cannot prune: {type(error).__name__}: {error}")
    if _current is not None:
        _current.leave_report("failed", reason=str(error))
    return USAGE if isinstance(error, OptionError) else FAILED


def training_begins() -> None:
    """LLaVA's trainer is being imported: it trains unpruned unless `--prune-train` was given."""
    if _current is not None and (_current.prunes or _current.request.device == "cpu"):
        _current.training_begins()


def say(line: str) -> None:
    """One line on stderr."""
    print(f"llava-hvp: {line}", file=sys.stderr, flush=True)


class Session:
    """What one process was asked, what it did, and how it ends.

    command : as `llava.eval.model_vqa`; "" for a command that is not LLaVA's own
    """

    def __init__(self, command: str, request: Request) -> None:
        self.command = command
        self.request = request
        self.totals = Totals()
        self._pid = os.getpid()
        self._unpruned = 0
        self._announced = False
        self._ended = False
        self._crash: str | None = None
        self._facts: dict[str, str] = {}

    @property
    def prunes(self) -> bool:
        """Whether pruning was asked for."""
        return self.request.method is not None

    # --- before LLaVA is imported ---

    def read_flags(self) -> None:
        """Our flags of the command line, which win over the environment."""
        flagged = self.command in startup.EVALUATING | startup.SERVING | startup.TRAINING
        if flagged:
            has_device = self.command in startup.EVALUATING
            request, sys.argv[1:] = config.parse(sys.argv[1:], device=has_device)
            if {"-h", "--help"} & set(sys.argv[1:]):
                _show_flags_in_help(has_device)
            self.take(request)
        else:
            self.take(Request())

    def take(self, flags: Request) -> None:
        """Put the flags before the environment; raises a LlavaHvpError for what does not fit."""
        training = self.command in startup.TRAINING
        if flags.train and not training:
            raise OptionError("--prune-train belongs to llava.train.train: leave it out")
        if flags.method is not None:
            if training and not flags.train:
                raise OptionError(
                    "--prune-method on a training command: training stays unpruned unless "
                    "--prune-train is given too"
                )
            self.request = dataclasses.replace(self.request, method=flags.method, train=flags.train)
        if self.command == "llava.serve.sglang_worker" and self.prunes:
            raise UnsupportedModelError(
                "llava.serve.sglang_worker runs LLaVA in sglang's own code, which cannot be "
                "pruned: use llava.serve.model_worker"
            )
        if flags.device is not None:
            self.request = dataclasses.replace(self.request, device=flags.device)
        if self.request.device == "cpu":
            # Before torch looks: on a machine with a GPU the model would be loaded there.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    # --- after LLaVA is imported ---

    def switch_on(self) -> None:
        """Prune every model that is loaded from now on, and watch that it happens."""
        if not self.prunes and self.request.device != "cpu":
            return
        from llava_hvp.host import builder, compat, versions
        from llava_hvp.host.device import bridge_to_cpu
        from llava_hvp.host.patches import Patches

        if self.request.device == "cpu":
            bridge_to_cpu(Patches())
        if self.request.method is None:
            compat.bridge()
            return
        self._versions = {"llava-hvp": llava_hvp.__version__, **versions.found_versions()}
        builder.install(self.request.method, on_model=self._watch)
        loader = importlib.import_module("llava.model.builder")
        self._patches = patches = Patches()
        patches.replace(
            loader, "load_pretrained_model", self._checking(loader.load_pretrained_model)
        )
        clip = importlib.import_module("llava.model.multimodal_encoder.clip_encoder")
        stock = clip.CLIPVisionTower.forward
        patches.replace(clip.CLIPVisionTower, "forward", self._counting(stock))
        self._await_the_end()

    def training_begins(self) -> None:
        """Bridge the trainer's gaps; take pruning back, unless training was to be pruned."""
        from llava_hvp.host import builder
        from llava_hvp.host.patches import Patches
        from llava_hvp.host.training import bridge_training

        if self.prunes and not self.request.train:
            builder.uninstall()
            self._patches.undo()
            self.request = dataclasses.replace(self.request, method=None)
            say("training stays unpruned: give --prune-train to prune it too")
        if self.prunes or self.request.device == "cpu":
            bridge_training(Patches())

    def _watch(self, pruning: Pruning) -> None:
        self._announce()
        owner = weakref.ref(pruning)

        def on_record(reports: list[ImageReport]) -> None:
            pruning = owner()
            if not self._facts and pruning is not None:
                self._facts = _facts(pruning.model)
            self.totals.add(reports)

        pruning.on_record = on_record

    def _checking(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The stock loader; what it gives is pruned, or an error."""

        @functools.wraps(stock)
        def load(*args: Any, **kwargs: Any) -> Any:
            self.before_load()
            loaded = stock(*args, **kwargs)
            self.after_load(*loaded[:2])
            return loaded

        return load

    def before_load(self) -> None:
        """A model is about to be loaded."""
        self._announce()
        answers = self._answers()
        if answers is not None:
            record_path(answers).unlink(missing_ok=True)

    def after_load(self, tokenizer: Any, model: Any) -> None:
        """Raise a LlavaHvpError unless the loaded model is pruned and ready for its first image."""
        from llava_hvp.host.history import bridge_history
        from llava_hvp.host.pruning import check_bound

        if not self.prunes:
            return
        pruning = check_bound(model)
        pruning.tokenizer = pruning.tokenizer or tokenizer
        pruning.load_text()
        if self.command == "llava.serve.cli":
            bridge_history(model)

    def _counting(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The stock tower's forward, which a pruned model never calls."""

        @functools.wraps(stock)
        def forward(tower: Any, images: Any) -> Any:
            self._unpruned += len(images)
            return stock(tower, images)

        return forward

    def _announce(self) -> None:
        """The one line that says that pruning is on, before the first model is loaded."""
        if self._announced or self.request.method is None:
            return
        self._announced = True
        # "llava" says what it is and where it lies: the place is for the record.
        versions = ", ".join(
            version.partition(" at ")[0] if name == "llava" else f"{name} {version}"
            for name, version in self._versions.items()
        )
        say(f"pruning on: {config.describe(self.request.method)} ({versions})")
        self.leave_report("started")

    # --- the end ---

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
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:

            def on_signal(number: int, frame: Any) -> None:
                self._crash = signal.Signals(number).name
                self.finish()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

            signal.signal(signal.SIGTERM, on_signal)

    def finish(self) -> None:
        """Sum up, write the record, and end the process with an error if it went unpruned."""
        if os.getpid() != self._pid or self._ended or not self._announced or not self.prunes:
            return
        self._ended = True
        if self._unpruned:
            say(
                f"error: {self._unpruned} images were encoded without pruning, "
                f"{self.totals.images} with it: something builds or calls the vision tower past "
                "LLaVA's loader; do not use these answers as pruned ones"
            )
            self.leave_report("failed", reason="images were encoded without pruning")
            sys.stdout.flush()
            os._exit(FAILED)
        answers = self._answers()
        if self._crash and not self.totals.images:
            self.leave_report("failed", reason=self._crash)
            return
        line = str(self.totals)
        if self._crash is not None:
            line += f"; stopped by {self._crash}"
        elif answers is not None and answers.is_file():
            write_json(record_path(answers), self._record(answers))
            line += f"; record: {record_path(answers)}"
        say(line)
        self.leave_report("failed" if self._crash else "done", reason=self._crash)

    def _answers(self) -> Path | None:
        """The answers file of an eval script, which keeps its arguments in a global."""
        if self.command not in startup.EVALUATING:
            return None
        name = getattr(getattr(sys.modules["__main__"], "args", None), "answers_file", None)
        return None if name is None else Path(name).expanduser()

    def _record(self, answers: Path) -> dict[str, Any]:
        method = self.request.method
        assert method is not None
        return {
            "method": method.name,
            "options": dataclasses.asdict(method),
            "given": config.to_flags(Request(method)),
            "command": [self.command, *sys.argv[1:]],
            "versions": {**self._versions, "python": platform.python_version()},
            **self._facts,
            "counts": self.totals.as_dict(),
            "answers": answers_facts(answers),
        }

    def leave_report(self, state: str, reason: str | None = None) -> None:
        """Tell the launcher, if there is one, how far this process has come."""
        if self.request.reports is None:
            return
        folder = Path(self.request.reports)
        if folder.is_dir():
            report = {
                "state": state,
                "reason": reason,
                "command": self.command or Path(sys.argv[0]).name,
                "pid": self._pid,
                "serves": self.command in startup.SERVING,
                "counts": self.totals.as_dict(),
            }
            write_json(folder / f"{self._pid}.json", report)


def _facts(model: Any) -> dict[str, str]:
    tower = model.get_vision_tower()
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "vision_tower_dtype": str(tower.dtype).removeprefix("torch."),
        "device": str(model.device),
        "quantization": str(getattr(model, "quantization_method", None) or "none"),
    }


def _show_flags_in_help(device: bool) -> None:
    """Add our flags to the first parser that parses: the stock command's."""
    stock = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        argparse.ArgumentParser.parse_known_args = stock  # type: ignore[method-assign]
        config.add_flags(parser, device=device)
        return stock(parser, *args, **kwargs)

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[assignment,method-assign]
