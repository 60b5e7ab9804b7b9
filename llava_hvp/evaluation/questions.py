"""Question files in LLaVA's three formats, and parts of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.benchmarks import JSON, JSONL, TSV
from llava_hvp.evaluation.files import QUESTIONS, ROWS, part_file
from llava_hvp.files import write_whole

OCR_LINE = "Reference OCR token:"
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Questions:
    """A question file.

    Parameters
    ----------
    items : list[Any]
        its records in order; of a table, those columns that do not hold pictures
    sha256 : str
        of the file as it is
    keys : list[Key]
        what an answer must have to belong to a question. TextVQA and MME give several questions one
        id, so that the text belongs to it
    images : list[str | None]
        picture of each question, None for a question without
    """

    path: Path
    format: str
    items: list[Any]
    sha256: str
    keys: list[Key]
    images: list[str | None]
    changed: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def key_of(self, answer: dict[str, Any]) -> Key:
        """The key of the question that an answer answers."""
        if self.format == JSONL:
            return answer.get("question_id"), answer.get("prompt")
        return (answer.get("question_id"),)

    def write_part(self, part: Path, rows: Sequence[int]) -> Path:
        """A question file of these rows for the stock script; gives its path."""
        if self.format == TSV:
            write_whole(part_file(part, ROWS), json.dumps(list(rows)).encode())
            return self.path
        if not self.changed and len(rows) == len(self):
            return self.path
        path = part_file(part, f"{QUESTIONS}.{self.format}")
        chosen = [self.items[row] for row in rows]
        lines = [json.dumps(item) + "\n" for item in chosen]
        write_whole(path, (json.dumps(chosen) if self.format == JSON else "".join(lines)).encode())
        return path


def read_questions(path: Path, format: str, *, without_ocr: bool = False) -> Questions:
    """Raises EvaluationError for a file that does not have the format."""
    content = path.read_bytes()
    try:
        if format == TSV:
            items = read_table(path).drop(columns="image").to_dict("records")
            keys: list[Key] = [(int(item["index"]),) for item in items]
            images: list[str | None] = [str(item["index"]) for item in items]
        elif format == JSON:
            items = json.loads(content)
            keys = [(item["id"],) for item in items]
            _ = [item["conversations"][0]["value"] for item in items]
            images = [item.get("image") for item in items]
        else:
            items = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
            if without_ocr:
                items = [item | {"text": strip_ocr(item["text"])} for item in items]
            keys = [(item["question_id"], item["text"]) for item in items]
            images = [item["image"] for item in items]
    except OptionError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EvaluationError(
            f"{path} is no question file of LLaVA's ({format}): {reason}"
        ) from error
    if not items:
        raise EvaluationError(f"{path} holds no question")
    digest = hashlib.sha256(content).hexdigest()
    return Questions(path, format, items, digest, keys, images, without_ocr)


def read_table(path: Path) -> Any:
    """A table as the stock script reads it.

    Raises OptionError where pandas is missing, or openpyxl, which the upload is written with.
    """
    try:
        import openpyxl  # noqa: F401 - needed only after all answers, too late to say so
        import pandas
    except ImportError as error:
        raise OptionError(
            f"{error.name} is missing, which MMBench needs: pip install 'llava-hvp[mmbench]'"
        ) from error
    return pandas.read_table(path)


def strip_ocr(text: str) -> str:
    """A TextVQA prompt without the line of OCR tokens."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(OCR_LINE))
