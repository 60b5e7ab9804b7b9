"""`llava-hvp run FLAGS -- COMMAND`: prune in every LLaVA process that a command starts.

The flags go into the variable LLAVA_HVP, which children inherit; the hook in each of them does the
rest, and leaves word of what became of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp import config
from llava_hvp.cli.interpreter import hook_in, python_of
from llava_hvp.cli.nodes import sent_along, starts_one_of_several
from llava_hvp.cli.parser import add_command
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import OptionError, RecordError
from llava_hvp.methods import folder_of
from llava_hvp.pruning.record import UNWRITTEN, Totals, added, summary
from llava_hvp.runtime import PruningConfig

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
NOT_FOUND, NOT_EXECUTABLE, FAILED = 127, 126, 1

EXAMPLES = (
    "llava-hvp run --prune-method hivtp --r-max 0.5 --device cpu -- python -m "
    "llava.eval.run_llava --model-path shapes/llava-shapes --image-file "
    "shapes/llava-shapes/pictures/1.png --query 'How many shapes?' --temperature 0",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "run",
        "run any command with pruning on, shell scripts included",
        "Every LLaVA process that the command starts is pruned, and ends with an "
        "error if it cannot be; each says at its end what it kept.",
        EXAMPLES,
        usage="llava-hvp run --prune-method NAME [--r-max R | --num-tokens N] "
        "[--prune-opt KEY=VALUE]... [--prune-inside NAME ...] -- COMMAND...",
    )
    config.add_flags(parser, device=True, train=True)
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class RunSettings:
    """A command line, and how the LLaVA processes that it starts are to prune."""

    request: Request
    command: tuple[str, ...]


def parse(args: argparse.Namespace) -> RunSettings:
    """The settings; raises OptionError for what could not prune."""
    request = config.requested(args)
    if not request.asked:
        raise OptionError("--prune-method is missing: `llava-hvp methods` lists the methods")
    command = args.rest
    if not command:
        raise OptionError("no command to run: give it after --, as -- bash scripts/eval.sh")
    if config.switched_off(os.environ):
        raise OptionError(f"{config.DISABLE_VARIABLE} is set, nothing would be pruned: unset it")
    python = python_of(command)
    hooked = hook_in(python) if python else None
    if hooked is not None and not hooked[0]:
        raise OptionError(
            f"{shlex.join(python)} ({hooked[1]}) runs no startup hook of ours: install llava-hvp "
            "there, and leave -S out"
        )
    return RunSettings(request, tuple(command))


def run(settings: RunSettings) -> int:
    """Run the command; its exit code, or 1 where a process of it should have pruned and failed."""
    with _folder() as reports:
        request = dataclasses.replace(settings.request, reports=reports)
        environ = {**os.environ, config.VARIABLE: shlex.join(config.to_flags(request))}
        if request.pruning is not None:
            environ |= _search_path(request.pruning)
        environ |= sent_along(environ, Path(reports))
        if starts_one_of_several(settings.command):
            say(
                "this command starts one of several nodes: give the same `llava-hvp run` on each. "
                "A training some of whose ranks do not prune ends with an error"
            )
        code = execute(settings.command, environ)
        failed = tell(read_reports(Path(reports)), code, pruned=request.pruning is not None)
    if code < 0:
        _die_of(-code)
    return code or (FAILED if failed else 0)


def _search_path(pruning: PruningConfig) -> dict[str, str]:
    """So that children find methods of this folder's, wherever they go."""
    folders = {folder_of(type(method)) for method in pruning.methods} - {None}
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, (before, *folders)))
    return {"PYTHONPATH": path} if folders else {}


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where processes leave word; raises RecordError where there is no place for it."""
    try:
        return tempfile.TemporaryDirectory(prefix="llava-hvp-")
    except OSError as error:
        raise RecordError(
            f"no folder for the reports of processes can be made: {error}. Set TMPDIR to a folder "
            "on a disk with space"
        ) from error


def execute(command: Sequence[str], environ: dict[str, str]) -> int:
    """Run to the end with signals passed on; as `Popen.returncode`, negative for a signal."""
    children: list[subprocess.Popen[bytes]] = []
    waiting: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if number in (signal.SIGINT, signal.SIGQUIT) and _from_terminal():
            return  # the terminal has sent it to the child as well
        if children:
            children[0].send_signal(number)
        else:
            waiting.append(number)

    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    before = {n: signal.signal(n, forward) for n in numbers if signal.getsignal(n) is not None}
    try:
        children.append(subprocess.Popen(command, env=environ))
        for number in waiting:
            children[0].send_signal(number)
        return children[0].wait()
    except FileNotFoundError:
        say(f"error: no command {command[0]!r}")
        return NOT_FOUND
    except OSError as error:
        say(f"error: cannot run {command[0]!r}: {error}")
        return NOT_EXECUTABLE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _from_terminal() -> bool:
    """Whether a terminal sends its signals to us and our children together."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _die_of(number: int) -> None:
    """End as the command did, so that whoever called us sees the same."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What each LLaVA process said last; what could not be written is known by its reason."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for path in sorted(folder.glob(f"*{UNWRITTEN}")):
        pid, name, _ = path.name.split(".")
        reason = os.strerror(getattr(errno, name))
        unknown = {"command": "a process", "pid": pid, "counts": Totals().as_dict()}
        report = reports.setdefault(pid, unknown | {"state": "started", "serves": False})
        if report["state"] == "started":
            told = f"it could not tell how it ended: {folder} cannot be written: {reason}"
            report |= {"state": "unrecorded", "reason": told}
    return list(reports.values())


def tell(reports: list[dict[str, Any]], code: int, *, pruned: bool = True) -> bool:
    """Sum up on stderr; whether a process that should have pruned came to grief.

    Parameters
    ----------
    code : int
        the command's own, since one that failed by itself needs no warning
    pruned : bool
        False where `none` was asked for
    """
    lost = [r for r in reports if r["state"] in ("failed", "unrecorded") or _vanished(r)]
    for report in lost:
        who = f"{report['command']} (process {report['pid']})"
        if report["state"] == "unrecorded":
            say(f"error: {who}: {report['reason']}")
            continue
        reason = report["reason"] or "it was killed"
        say(
            f"error: {who} did not finish{' pruned' * pruned}: "
            f"{reason}. Answers of it may be missing, or left from an earlier run"
        )
    done = [r["counts"] for r in reports if r["counts"]["images"]]
    if not done and not lost and code == 0:
        on_path = hook_in()
        where = "" if on_path is None or on_path[0] else f" (`python` is {on_path[1]}, without it)"
        say(
            f"warning: no process of this command {'pruned' if pruned else 'encoded'} an image. "
            "If it ran LLaVA, then with a "
            f"Python that has no llava-hvp{where}, with `python -S`, or with code other than the "
            "`llava` package and transformers' own classes: see `llava-hvp doctor`"
        )
    elif len(reports) > 1:
        say(f"{len(reports)} processes, {summary(added(done))}")
    return bool(lost)


def _vanished(report: dict[str, Any]) -> bool:
    """Started, never finished, and gone. A server may be stopped at any time."""
    if report["state"] != "started" or report["serves"]:
        return False
    try:
        os.kill(report["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
