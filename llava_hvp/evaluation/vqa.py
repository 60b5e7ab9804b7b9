"""VQAv2 and VizWiz: files for their servers, and the VQA accuracy of a split with annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.data import Data
from llava_hvp.evaluation.files import complete_lines, read_json
from llava_hvp.evaluation.questions import Questions
from llava_hvp.evaluation.store import Store
from llava_hvp.files import write_whole


def write_vqav2_upload(data: Data, store: Store, path: Path) -> Path:
    """An answer to every question of the whole test split; empty for those that were not asked."""
    from llava_hvp.hosts.llava.answers import normalise

    texts = {a.record["question_id"]: a.record["text"] for a in store.in_order}
    asked = [json.loads(line)["question_id"] for line in complete_lines(data.scoring["upload"])[0]]
    listed = [
        {"question_id": i, "answer": normalise(texts[i]) if i in texts else ""} for i in asked
    ]
    return _write(path, listed)


def write_vizwiz_upload(data: Data, store: Store, path: Path) -> Path:
    """An answer to each picture."""
    from llava_hvp.hosts.llava.answers import normalise

    listed = [
        {"image": data.questions.images[row], "answer": normalise(answers[0].record["text"])}
        for row, answers in sorted(store.answers.items())
    ]
    return _write(path, listed)


def _write(path: Path, listed: list[dict[str, Any]]) -> Path:
    write_whole(path, json.dumps(listed).encode())
    return path


def count(annotations: Path, questions: Questions, store: Store) -> float:
    """VQA accuracy in percent, by LLaVA's own evaluator: ten human answers, three make it right.

    Parameters
    ----------
    annotations : Path
        VQAv2's (by question) or VizWiz's (by picture)
    """
    from llava_hvp.hosts.llava.answers import accuracy

    content = read_json(annotations)
    listed = content["annotations"] if isinstance(content, dict) else content
    by = "question_id" if "question_id" in listed[0] else "image"
    truths = {each[by]: [a["answer"] for a in each["answers"]] for each in listed}
    pairs = []
    for row, answers in sorted(store.answers.items()):
        name = questions.items[row][by]
        if name not in truths:
            raise EvaluationError(f"--annotation-file {annotations} has no answers to {name!r}")
        pairs.append((answers[0].record["text"], truths[name]))
    return 100 * accuracy(pairs)
