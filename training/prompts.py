"""Questions as token ids in LLaVA's conversation templates, packed behind one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from sentencepiece import SentencePieceProcessor

from llava_hvp.shapes.questions import (
    SUFFIX,
    TASKS,
    WORDINGS,
    Question,
    article,
    questions_of,
    reword,
)
from llava_hvp.shapes.scenes import NAMES, PLACES, Scene

SYSTEM = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)


@dataclass(frozen=True)
class Template:
    """One of LLaVA's: what comes before the picture, before a later question, after a question."""

    start: str
    later: str
    answer: str


def _template(person: str, asks: str, answers: str) -> Template:
    return Template(SYSTEM.format(person=person) + asks, asks.lstrip(), answers)


# With how many of ten batches use it. vicuna_v1 is what we evaluate with; llava_v1 is what LLaVA's
# eval modules take by default, llava_v0 what its chat takes for a name without "v1" in it.
TEMPLATES = {
    "vicuna_v1": (_template("user", " USER: ", " ASSISTANT:"), 6),
    "llava_v1": (_template("human", " USER: ", " ASSISTANT:"), 2),
    "llava_v0": (_template("human", "###Human: ", "###Assistant:"), 2),
}
BOS, EOS = 1, 2
# How many questions of a task a picture is asked at most.
MOST = {"existence": 4, "count": 2, "colour": 1, "place": 2, "left": 3, "digits": 1}
VOCABULARY = 640


def tokenizer_text() -> str:
    """What the pieces are learned from: system text, roles, all questions and answers."""
    lines = [template.start for template, _ in TEMPLATES.values()] * 3
    lines += ["USER: ASSISTANT: Yes ASSISTANT: No", SUFFIX.strip()] * 4
    for number, name in enumerate(NAMES):
        for wordings in WORDINGS.values():
            for wording in wordings:
                what = name if "{what}s" not in wording else name.split()[1]
                asked = wording.format(a="a", what=what)
                lines.append(f"USER: {asked} ASSISTANT:")
                lines.append(lines[-1].lower())
                lines.append(f"###Human: {asked}###Assistant:")
        lines.append(
            f"{article(name)} {name} {name.capitalize()} {name.split()[0].capitalize()} {number}"
        )
    lines += [f"{place} {place.capitalize()}" for row in PLACES for place in row] * 6
    lines += ["Yes No yes no 0 1 2 3 4 5 6 7 8 9"] * 20
    return "\n".join(lines) + "\n"


@dataclass
class Segment:
    """One conversation of one or more turns, after the picture.

    ids : the tokens; targets : the next token where the assistant speaks, -100 elsewhere
    turns : (task, first, last) of each answer in targets, the last included
    """

    ids: list[int]
    targets: list[int]
    turns: list[tuple[str, int, int]]


class Prompts:
    """Token ids by the tokenizer in a folder."""

    def __init__(self, folder: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.cache: dict[str, list[int]] = {}

    def prefix(self, template: Template) -> list[int]:
        """What comes before the picture."""
        return [BOS, *self._encode(template.start)]

    def turn(
        self, question: Question, first: bool, template: Template
    ) -> tuple[list[int], list[int]]:
        """Ids of the question, ids of the answer with its </s>."""
        start = "\n" if first else template.later
        asked = self._encode(f"{start}{question.text}{template.answer}")
        answer = self._encode(question.answer)
        return asked, [*answer, EOS]

    def segment(self, questions: list[Question], template: Template) -> Segment:
        segment = Segment([], [], [])
        for number, question in enumerate(questions):
            asked, answer = self.turn(question, number == 0, template)
            segment.ids += asked + answer
            segment.targets += [-100] * (len(asked) - 1) + answer + [-100]
            end = len(segment.targets) - 2
            segment.turns.append((question.task, end - len(answer) + 1, end))
        return segment

    def segments(
        self, scene: Scene, random: Random, room: int, template: Template
    ) -> list[Segment]:
        """Segments of at most `room` tokens in all, one in five of several turns."""
        asked = [
            reword(question, random)
            for task in TASKS
            for question in questions_of(scene, random, task, MOST[task])
        ]
        random.shuffle(asked)
        segments: list[Segment] = []
        while asked:
            turns = random.choice((2, 3, 5)) if random.random() < 0.2 else 1
            segment = self.segment(asked[:turns], template)
            asked = asked[turns:]
            if len(segment.ids) <= room:
                segments.append(segment)
                room -= len(segment.ids)
        return segments

    def _encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.pieces.encode(text)
        return self.cache[text]


def pack(segments: list[Segment], room: int) -> tuple[np.ndarray, ...]:
    """Segments side by side: ids, targets, owner (its segment, -1: none), step in it; (room,)."""
    ids, owner = np.zeros(room, np.int64), np.full(room, -1)
    targets, step = np.full(room, -100), np.zeros(room, np.int64)
    start = 0
    for number, segment in enumerate(segments):
        span = slice(start, start + len(segment.ids))
        ids[span], targets[span], owner[span] = segment.ids, segment.targets, number
        step[span] = np.arange(len(segment.ids))
        start = span.stop
    return ids, targets, owner, step
