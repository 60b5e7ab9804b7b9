"""Answers on the disk as soon as they are given, so that an interrupted measurement goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llava_hvp.evaluation.resuming import resumed


@dataclass(frozen=True)
class Answered:
    """What one variant said to one sheet of questions.

    Parameters
    ----------
    said : list[str]
        an answer for each question
    kept : float
        visual tokens of all images that enter a layer of the language model, averaged over all
    kept_of_patches : float
        sum over images of kept patches / (N x tiles)
    seconds : float
        from images and prompts to answers
    """

    said: list[str]
    kept: float
    kept_of_patches: float
    seconds: float


@dataclass(frozen=True)
class Chosen:
    """What one variant chose on one sheet's pictures, and in what time.

    Parameters
    ----------
    kept : int
        patches, in float32
    common : dict[str, int]
        dtype -> how many of them are kept in that dtype too; without those that cannot be computed
    floor, encode : float
        seconds of the image encode: with these patches known beforehand, and with the choice
    """

    kept: int
    common: dict[str, int]
    floor: float
    encode: float


class Answers:
    """Answers and choices by sheet and variant; with a file, each is a line of it.

    Parameters
    ----------
    folder : Path | None
        what `keeping` keeps them in
    """

    def __init__(self, folder: Path | None = None, file: TextIO | None = None) -> None:
        self.folder, self._file = folder, file
        self._found: dict[tuple[int, str], Answered] = {}
        self._chosen: dict[tuple[int, str], Chosen] = {}

    def find(self, sheet: int, variant: str) -> Answered | None:
        """What is there already."""
        return self._found.get((sheet, variant))

    def add(self, sheet: int, variant: str, answered: Answered) -> None:
        """Remember; once this returns, a kill loses it no more."""
        self._found[sheet, variant] = answered
        self._write(sheet, variant, answered)

    def chosen(self, sheet: int, variant: str) -> Chosen | None:
        """What is there already; sheets of choices are numbered by themselves."""
        return self._chosen.get((sheet, variant))

    def all_chosen(self, variant: str) -> list[Chosen]:
        """Of a variant, on every sheet."""
        return [chosen for (_, name), chosen in self._chosen.items() if name == variant]

    def add_chosen(self, sheet: int, variant: str, chosen: Chosen) -> None:
        """Remember, as `add` does."""
        self._chosen[sheet, variant] = chosen
        self._write(sheet, variant, chosen)

    def _write(self, sheet: int, variant: str, found: Answered | Chosen) -> None:
        if self._file is not None:
            line = json.dumps({"sheet": sheet, "variant": variant, **asdict(found)})
            self._file.write(line + "\n")
            self._file.flush()

    def read(self, lines: list[str]) -> None:
        """Take in lines of an earlier run."""
        for record in map(json.loads, lines):
            key = record.pop("sheet"), record.pop("variant")
            if "said" in record:
                self._found[key] = Answered(**record)
            else:
                self._chosen[key] = Chosen(**record)

    def __len__(self) -> int:
        return sum(len(answered.said) for answered in self._found.values())

    def throw_away(self) -> None:
        """The folder goes, once the results are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


@contextlib.contextmanager
def keeping(folder: Path, settings: dict[str, Any], *, restart: bool = False) -> Iterator[Answers]:
    """Answers kept in a folder, with those that an earlier run of the same settings left there.

    Parameters
    ----------
    settings : dict[str, Any]
        everything that the answers depend on, as JSON gives it back
    restart : bool
        throw away what is there

    Raises
    ------
    EvaluationError
        another run is at work there, or it holds answers of other settings
    """
    with resumed(folder, settings, restart=restart) as (lines, file):
        answers = Answers(folder, file)
        answers.read(lines)
        yield answers
