"""What candidates did to answers, in memory and on the disk, so that an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from llava_hvp.evaluation.resuming import resumed
from llava_hvp.tune.divergence import Moved

Key = tuple[str, int, str]  # half, sheet, candidate


class Measured:
    """`Moved` by half, sheet and candidate; with a file, each is a line of it."""

    def __init__(self, folder: Path | None = None, file: TextIO | None = None) -> None:
        self.folder, self._file = folder, file
        self._found: dict[Key, Moved] = {}

    def find(self, half: str, sheet: int, candidate: object) -> Moved | None:
        """What is there already."""
        return self._found.get((half, sheet, str(candidate)))

    def of(self, half: str, candidate: object) -> list[Moved]:
        """Of a candidate, on every sheet of a half, in their order."""
        found = [(s, m) for (h, s, c), m in self._found.items() if (h, c) == (half, str(candidate))]
        return [moved for _, moved in sorted(found, key=lambda each: each[0])]

    def add(self, half: str, sheet: int, candidate: object, moved: Moved) -> None:
        """Remember; once this returns, a kill loses it no more."""
        self._found[half, sheet, str(candidate)] = moved
        if self._file is not None:
            place = {"half": half, "sheet": sheet, "candidate": str(candidate)}
            self._file.write(json.dumps({**place, **asdict(moved)}) + "\n")
            self._file.flush()

    def read(self, lines: Sequence[str]) -> None:
        """Take in lines of an earlier run."""
        for record in map(json.loads, lines):
            key = record.pop("half"), record.pop("sheet"), record.pop("candidate")
            self._found[key] = Moved(**record)

    def __len__(self) -> int:
        return len(self._found)

    def throw_away(self) -> None:
        """The folder goes, once the results are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


@contextmanager
def keeping(folder: Path, settings: dict[str, Any], *, restart: bool = False) -> Iterator[Measured]:
    """Measurements kept in a folder, with those that an earlier run of the same settings left."""
    with resumed(folder, settings, restart=restart) as (lines, file):
        measured = Measured(folder, file)
        measured.read(lines)
        yield measured
