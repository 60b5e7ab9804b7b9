"""The folder of one run: answers that are there, and what the parts of an interrupted run left."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.console import say
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.benchmarks import TSV
from llava_hvp.evaluation.digests import Digests, difference
from llava_hvp.evaluation.files import (
    ANSWERS,
    CALLS,
    CALLS_OF_ALL,
    LOG,
    PART_ANSWERS,
    RESULT,
    SETTINGS,
    complete_lines,
    locked,
    other_settings,
    part_file,
    read_json,
)
from llava_hvp.evaluation.questions import Questions
from llava_hvp.files import write_json, write_whole

CHECKPOINT = "checkpoint"  # of the settings


@dataclass(frozen=True)
class Answer:
    """An answer as the stock script wrote it, and the measurement of its `generate`.

    Parameters
    ----------
    call : dict[str, Any] | None
        as llava_hvp.checkpoints.generate_stats.Call; None where it was lost
    """

    line: str
    record: dict[str, Any]
    call: dict[str, Any] | None


class Store:
    """Answers of one run by the row of their question.

    Parameters
    ----------
    all_rounds : bool
        MMBench asks once for each rotation of the options
    """

    def __init__(self, folder: Path, questions: Questions, *, all_rounds: bool = False) -> None:
        self.folder, self.questions, self.all_rounds = folder, questions, all_rounds
        self.answers: dict[int, list[Answer]] = {}

    @property
    def parts(self) -> Path:
        """Folder of the parts that are being answered."""
        return self.folder / "parts"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; the lock of a killed process is gone with it."""
        with locked(self.folder):
            self.parts.mkdir(exist_ok=True)
            yield

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to go on with answers of other settings; note these where there are no answers."""
        path = self.folder / SETTINGS
        if self._has_answers():
            before = read_json(path) if path.exists() else {}
            self._compare(before, settings)
            if before[CHECKPOINT] == settings[CHECKPOINT]:
                return
            say(f"{self.folder}: its answers are taken for this checkpoint's, which was not here")
        write_json(path, settings)

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in {**before, **settings}:
            then, now = before.get(name), settings.get(name)
            if name == CHECKPOINT:
                why = difference(then, settings[CHECKPOINT])
                if why is not None:
                    raise EvaluationError(
                        f"{self.folder} holds answers that may not be this checkpoint's: {why}. "
                        "Give --restart to throw those answers away, or --out another folder"
                    )
            elif then != now:
                raise other_settings(self.folder, name, then, now)

    def check_again(self, settings: dict[str, Any], digests: Digests) -> None:
        """Raise EvaluationError for a checkpoint that changed while it was answering.

        What was not here when the answers were begun is noted.
        """
        why = difference(settings[CHECKPOINT], digests)
        if why is not None:
            raise EvaluationError(
                f"{self.folder}: the checkpoint changed while it was answering: {why}. Give "
                "--restart to throw those answers away"
            )
        if settings[CHECKPOINT] != digests:
            settings[CHECKPOINT] = digests
            write_json(self.folder / SETTINGS, settings)

    def _has_answers(self) -> bool:
        found = [self.folder / ANSWERS, *self.parts.glob(f"*{PART_ANSWERS}")]
        return any(path.exists() and path.stat().st_size for path in found)

    def restart(self) -> None:
        """Throw away everything but the lock."""
        for name in (ANSWERS, CALLS_OF_ALL, SETTINGS, RESULT):
            (self.folder / name).unlink(missing_ok=True)
        self._clear_parts()

    def collect(self) -> None:
        """Take in what the parts have answered; nothing is written where a file is damaged.

        Raises EvaluationError for answers that belong to no question of this file.
        """
        found = self._answers_of(self.folder / ANSWERS, None)
        for path in sorted(self.parts.glob(f"*{PART_ANSWERS}")):
            part = path.with_name(path.name.removesuffix(PART_ANSWERS))
            found += self._answers_of(path, part_file(part, CALLS))
        unique = {answer.record.get("answer_id", answer.line): answer for answer in found}
        self.answers = self._by_row(list(unique.values()))
        self._save()
        self._clear_parts(but=LOG)

    def _answers_of(self, path: Path, calls: Path | None) -> list[Answer]:
        lines, rest = complete_lines(path)
        if rest:
            say(f"{path}: the last answer was half written and will be asked for again")
        records = [json.loads(line) for line in lines]
        if calls is None:
            of_all = complete_lines(self.folder / CALLS_OF_ALL)[0]
            by_id = {call.pop("answer_id"): call for call in map(json.loads, of_all)}
            measured = [by_id.get(record.get("answer_id")) for record in records]
        else:
            # Measured before it is written: there may be one more of these than of answers.
            measured = [json.loads(line) for line in complete_lines(calls)[0]]
            measured += [None] * (len(records) - len(measured))
        return [Answer(*each) for each in zip(lines, records, measured, strict=False)]

    def _by_row(self, answers: list[Answer]) -> dict[int, list[Answer]]:
        rows: dict[Any, deque[int]] = defaultdict(deque)
        for row, key in enumerate(self.questions.keys):
            rows[key].append(row)
        by_key: dict[Any, list[Answer]] = defaultdict(list)
        for answer in answers:
            key = self.questions.key_of(answer.record)
            if key not in rows:
                raise EvaluationError(
                    f"{self.folder} has an answer to {key[0]!r}, which is no question of "
                    f"{self.questions.path}. Give the question file of then, or --restart to throw "
                    "those answers away"
                )
            by_key[key].append(answer)
        found: dict[int, list[Answer]] = {}
        for key, group in by_key.items():
            if self.all_rounds and self.questions.format == TSV:
                rounds = sorted(group, key=lambda a: a.record.get("round_id", 0))
                asked = [a.record.get("round_id") for a in rounds]
                if asked == list(range(len(rounds[0].record.get("options", ())))):
                    found[rows[key][0]] = rounds
            elif len(group) > len(rows[key]):
                raise EvaluationError(
                    f"{self.folder} has {len(group)} answers to {key[0]!r}, which is asked "
                    f"{len(rows[key])} times: take the surplus out of {ANSWERS}, or give --restart"
                )
            else:
                found |= {row: [a] for row, a in zip(rows[key], group, strict=False)}
        return found

    @property
    def remaining(self) -> list[int]:
        """Rows without an answer."""
        return [row for row in range(len(self.questions)) if row not in self.answers]

    @property
    def in_order(self) -> list[Answer]:
        """The answers in the order of the question file."""
        return [answer for row in sorted(self.answers) for answer in self.answers[row]]

    @property
    def answers_file(self) -> Path:
        """Where all answers are, as one stock script would have written them."""
        return self.folder / ANSWERS

    def _save(self) -> None:
        answers = self.in_order
        calls = [
            json.dumps({"answer_id": a.record.get("answer_id"), **a.call})
            for a in answers
            if a.call is not None
        ]
        write_whole(self.folder / CALLS_OF_ALL, "".join(f"{c}\n" for c in calls).encode())
        write_whole(self.answers_file, "".join(f"{a.line}\n" for a in answers).encode())

    def _clear_parts(self, but: str | None = None) -> None:
        for path in self.parts.glob("*"):
            if but is None or not path.name.endswith(but):
                os.unlink(path)
