"""Names of the files of a run, and reading JSON lines of which the last may be half written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_hvp.errors import EvaluationError

RESULT, SETTINGS, ANSWERS, CALLS_OF_ALL = (
    "result.json",
    "settings.json",
    "answers.jsonl",
    "calls.jsonl",
)
LOCK = "lock"
# Of one part, after its name.
QUESTIONS, PART_ANSWERS, CALLS, ROWS, LOG = (
    ".questions",
    ".answers.jsonl",
    ".calls.jsonl",
    ".rows.json",
    ".log",
)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock of a killed process is gone with it.

    Raises EvaluationError where another run is at work, or where nothing can be written.
    """
    import fcntl  # not on Windows

    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise EvaluationError(f"{folder}: cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended just now may have taken its folder away.
            is_there = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except OSError:
            is_there = False
        if not is_there:
            raise EvaluationError(
                f"another run is at work in {folder}: wait for its end, or give --out another "
                "folder"
            )
        yield


def part_file(part: Path, suffix: str) -> Path:
    """A file of a part: `parts/0` -> `parts/0.calls.jsonl`."""
    return part.with_name(part.name + suffix)


def complete_lines(path: Path) -> tuple[list[str], str]:
    """The lines that are whole, and what a killed process left of the last one.

    Raises EvaluationError for a line before the last that is not JSON.
    """
    if not path.exists():
        return [], ""
    *lines, rest = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    if lines and not rest and not _is_json(lines[-1]):
        rest = lines.pop()
    for number, line in enumerate(lines, 1):
        if not _is_json(line):
            raise EvaluationError(
                f"{path}, line {number}, is no answer: {line[:60]!r}. Mend the file, or give "
                "--restart to throw these answers away"
            )
    return lines, rest


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_json(path: Path) -> Any:
    """Raises EvaluationError, which names the file, for one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error


def other_settings(folder: Path, name: str, then: Any, now: Any) -> EvaluationError:
    """The error for answers in a folder that were given when a setting was another."""
    return EvaluationError(
        f"{folder} holds answers of other settings: {name} was {then!r} and is {now!r} now. Give "
        "the settings of then, or --out another folder, or --restart to throw those answers away"
    )
