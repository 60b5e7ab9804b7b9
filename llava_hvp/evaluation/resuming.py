"""Lines on the disk as soon as they are known, so that an interrupted measurement goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_hvp.console import say
from llava_hvp.evaluation.files import (
    ANSWERS,
    SETTINGS,
    complete_lines,
    locked,
    other_settings,
    read_json,
)
from llava_hvp.files import write_json, write_whole


@contextlib.contextmanager
def resumed(
    folder: Path, settings: dict[str, Any], *, restart: bool = False
) -> Iterator[tuple[list[str], TextIO]]:
    """The lines that an earlier run of the same settings left in a folder, and where to add more.

    Parameters
    ----------
    settings : dict[str, Any]
        everything that the lines depend on, as JSON gives it back
    restart : bool
        throw away what is there

    Raises
    ------
    EvaluationError
        another run is at work there, or it holds lines of other settings
    """
    with locked(folder):
        path = folder / ANSWERS
        if restart:
            path.unlink(missing_ok=True)
        lines, rest = complete_lines(path)
        if lines:
            _refuse_others(folder, settings)
        if rest:
            say(f"{path}: the last answers were half written and will be asked for again")
        write_json(folder / SETTINGS, settings)
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
        with path.open("a", encoding="utf-8") as file:
            yield lines, file


def _refuse_others(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    before = read_json(path) if path.exists() else {}
    for name in {**before, **settings}:
        then, now = before.get(name), settings.get(name)
        if then != now:
            raise other_settings(folder, name, then, now)
