"""MMBench: the table for its server, and a score of the dev split, whose answers are public."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from llava_hvp.evaluation.questions import Questions, read_table
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_whole

LETTERS = "ABCD"
# Rotations of one question have indices that differ by multiples of this.
CIRCLE = 1_000_000
HOW = (
    "counted here by letter or by the option's own words; circular: right in every rotation. The "
    "server reads free answers with a language model and may say otherwise"
)
NOT_UPLOADED = ["hint", "category", "source", "image", "comment", "l2-category"]


def write_upload(table_path: Path, store: Store, path: Path) -> Path:
    """The question table with a column of predictions, as the server takes it."""
    table = read_table(table_path)
    first = {row: answers[0].record["text"] for row, answers in store.answers.items()}
    upload = table.drop(columns=NOT_UPLOADED, errors="ignore")
    upload.insert(min(6, upload.shape[1]), "prediction", [first[row] for row in range(len(table))])
    content = io.BytesIO()
    upload.to_excel(content, index=False, engine="openpyxl")
    write_whole(path, content.getvalue())
    return path


def count(questions: Questions, store: Store) -> dict[str, float]:
    """Accuracy in percent; empty for a split without answers."""
    items = questions.items
    if not all(str(item.get("answer", "")) in tuple(LETTERS) for item in items):
        return {}
    right = [
        all(
            letter_of(a.record["text"], a.record["options"], a.record["option_char"])
            == item["answer"]
            for a in store.answers[row]
        )
        for row, item in enumerate(items)
    ]
    circles: dict[int, list[bool]] = defaultdict(list)
    for item, each in zip(items, right, strict=True):
        circles[int(item["index"]) % CIRCLE].append(each)
    return {
        "accuracy": 100 * sum(right) / len(right),
        "circular_accuracy": 100 * sum(map(all, circles.values())) / len(circles),
    }


def letter_of(text: str, options: list[Any], letters: list[str]) -> str:
    """The option that an answer names by its letter (`B`, `B.`, `(B) a cat`) or its words."""
    text = text.strip()
    found = re.match(r"\(?([A-D])(?:[\s.,:)]|$)", text)
    if found and found[1] in letters:
        return found[1]
    same = [letter for letter, o in zip(letters, options, strict=True) if _words(o) == _words(text)]
    return same[0] if len(same) == 1 else ""


def _words(text: Any) -> str:
    return str(text).strip().rstrip(".").lower()
