"""Questions put to LLaVA in batches, each variant in turn on every batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_hvp.bench.applied import applied
from llava_hvp.bench.variants import Variant
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.questions import Question, is_right
from llava_hvp.shapes.scenes import Scene

# The template that the committed results are in; the shipped checkpoints know two others as well.
TEMPLATE = "vicuna_v1"
LONGEST = 10  # tokens of an answer; the longest right one has five


@dataclass
class Marks:
    """What one variant came to.

    right, asked : task -> number of answers
    kept : visual tokens of all images
    kept_of_patches : sum over images of kept patches / (N x tiles)
    seconds : of all its batches, from images and prompts to answers
    """

    variant: Variant
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    kept: int = 0
    kept_of_patches: float = 0.0
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """As many as questions: each comes with its own."""
        return sum(self.asked.values())


@dataclass(frozen=True)
class _Sheet:
    """Questions that make a batch without padding, on pictures of one size."""

    ids: torch.Tensor
    pictures: list[Any]
    questions: list[Question]


def examine(
    opened: Any,
    asked: Iterable[tuple[Scene, Question]],
    variants: Sequence[Variant],
    *,
    batch: int,
    tick: Callable[[int], None] = lambda questions: None,
) -> list[Marks]:
    """Ask every question of every variant, through LLaVA's own `generate`, greedily.

    Parameters
    ----------
    opened : the checkpoint, of `llava_hvp.host.opening`
    batch : questions at a time, at most; those of a batch have prompts of one length and pictures
        of one size, since stock LLaVA cannot generate from padded rows
    tick : called with the number of answers after every batch of every variant
    """
    marks = [Marks(variant) for variant in variants]
    room, first_time = _Room(opened), True
    for sheet in _sheets(opened, list(asked), batch):
        images = opened.images(sheet.pictures)
        for mark in marks:
            if first_time:  # the first call of a process is slow
                room.answer(sheet, images, Marks(mark.variant))
            answers = room.answer(sheet, images, mark)
            for said, question in zip(answers, sheet.questions, strict=True):
                mark.asked[question.task] += 1
                mark.right[question.task] += is_right(said, question)
            tick(len(answers))
        first_time = False
    return marks


@dataclass
class _Room:
    """Where a sheet is answered; the first prompt-aware method brings the text encoder."""

    opened: Any
    clip_text: Any = None

    def answer(self, sheet: _Sheet, images: Any, mark: Marks) -> list[str]:
        model, tokenizer = self.opened.model, self.opened.tokenizer
        put_on = applied(
            mark.variant, model, self.opened.dtype, tokenizer=tokenizer, clip_text=self.clip_text
        )
        with put_on as pruning, torch.inference_mode():
            started = time.perf_counter()
            output = model.generate(
                sheet.ids,
                images=images,
                image_sizes=[picture.size for picture in sheet.pictures],
                do_sample=False,
                max_new_tokens=LONGEST,
                use_cache=True,
            )
            mark.seconds += time.perf_counter() - started
            if pruning is not None:
                self.clip_text = pruning.clip_text
                mark.kept += sum(report.kept_tokens for report in pruning.last)
                mark.kept_of_patches += sum(report.kept_of_patches for report in pruning.last)
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def _sheets(opened: Any, asked: list[tuple[Scene, Question]], batch: int) -> Iterator[_Sheet]:
    """Batches of equal prompt length and picture size; every question is in one."""
    groups: dict[Any, list[tuple[torch.Tensor, Any, Question]]] = defaultdict(list)
    for scene, question in asked:
        ids, picture = opened.prompt(question.text), draw(scene)
        groups[len(ids), picture.size].append((ids, picture, question))
    for group in groups.values():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            ids = torch.stack([ids for ids, _, _ in part])
            yield _Sheet(ids, [picture for _, picture, _ in part], [q for _, _, q in part])
