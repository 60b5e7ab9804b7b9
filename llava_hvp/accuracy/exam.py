"""Questions put to LLaVA in batches, each variant in turn on every batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llava_hvp.accuracy.store import Answered, Answers
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.questions import Question, is_right
from llava_hvp.shapes.scenes import Scene

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

# The template that the committed results are in; the shipped checkpoints know two others as well.
TEMPLATE = "vicuna_v1"
LONGEST = 10  # tokens of an answer; the longest right one has five


@dataclass
class Marks:
    """What one variant came to.

    Parameters
    ----------
    right, asked : dict[str, int]
        task -> number of answers
    kept : float
        visual tokens of all images that enter a layer of the language model, averaged over all
    kept_of_patches : float
        sum over images of kept patches / (N x tiles)
    seconds : float
        of all its batches, from images and prompts to answers
    each : list[bool]
        of every question, whether its answer is right; for all variants in one order
    """

    variant: Variant
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    kept: float = 0.0
    kept_of_patches: float = 0.0
    seconds: float = 0.0
    each: list[bool] = field(default_factory=list)

    def add(self, questions: Sequence[Question], answered: Answered) -> None:
        """Mark the answers to a sheet of questions."""
        for said, question in zip(answered.said, questions, strict=True):
            right = is_right(said, question)
            self.asked[question.task] += 1
            self.right[question.task] += right
            self.each.append(right)
        self.kept += answered.kept
        self.kept_of_patches += answered.kept_of_patches
        self.seconds += answered.seconds

    @property
    def images(self) -> int:
        """As many as questions: each comes with its own."""
        return sum(self.asked.values())


@dataclass(frozen=True)
class Sheet:
    """Questions that make a batch without padding, on pictures of one size.

    Parameters
    ----------
    ids : torch.Tensor
        (B, L) int64, a prompt in each row
    pictures : list[Any]
        PIL pictures, one for each row
    """

    ids: torch.Tensor
    pictures: list[Any]
    questions: list[Question]


def examine(
    opened: Checkpoint,
    asked: Iterable[tuple[Scene, Question]],
    variants: Sequence[Variant],
    *,
    batch: int,
    tick: Callable[[int], None] = lambda questions: None,
    answers: Answers | None = None,
) -> list[Marks]:
    """Ask every question of every variant, through the host's own `generate`, greedily.

    Parameters
    ----------
    batch : int
        questions at a time, at most; those of a batch have prompts of one length and pictures of
        one size, since stock LLaVA cannot generate from padded rows
    tick : Callable[[int], None]
        called with the number of answers after every batch of every variant
    answers : Answers | None
        where they are kept; what is there is not asked for again
    """
    answers = Answers() if answers is None else answers
    marks = [Marks(variant) for variant in variants]
    warm: set[str] = set()
    for number, sheet in enumerate(sheets(opened, list(asked), batch)):
        images: dict[str, Any] = {}
        for mark in marks:
            answered = answers.find(number, str(mark.variant))
            if answered is None:
                tiling = mark.variant.runtime.tiling
                if tiling not in images:
                    images[tiling] = opened.images(sheet.pictures, mark.variant)
                if str(mark.variant) not in warm:  # the first call of a process is slow
                    _answer(opened, sheet, images[tiling], mark.variant)
                    warm.add(str(mark.variant))
                answered = _answer(opened, sheet, images[tiling], mark.variant)
                answers.add(number, str(mark.variant), answered)
            mark.add(sheet.questions, answered)
            tick(len(sheet.questions))
    return marks


def _answer(opened: Checkpoint, sheet: Sheet, images: Any, variant: Variant) -> Answered:
    kept, kept_of_patches = 0.0, 0.0
    with opened.pruned_by(variant) as pruning, torch.inference_mode():
        started = time.perf_counter()
        output = opened.generate(
            sheet.ids,
            images=images,
            image_sizes=[picture.size for picture in sheet.pictures],
            do_sample=False,
            max_new_tokens=LONGEST,
            use_cache=True,
        )
        seconds = time.perf_counter() - started
        if pruning is not None:
            kept = sum(report.average_tokens for report in pruning.last)
            kept_of_patches = sum(report.average_of_patches for report in pruning.last)
    said = opened.tokenizer.batch_decode(output, skip_special_tokens=True)
    return Answered([text.strip() for text in said], kept, kept_of_patches, seconds)


def sheets(opened: Checkpoint, asked: list[tuple[Scene, Question]], batch: int) -> Iterator[Sheet]:
    """Batches of equal prompt length and picture size; every question is in one."""
    groups: dict[Any, list[tuple[torch.Tensor, Any, Question]]] = defaultdict(list)
    for scene, question in asked:
        ids, picture = opened.prompt(question.text), draw(scene)
        groups[len(ids), picture.size].append((ids, picture, question))
    for group in groups.values():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            ids = torch.stack([ids for ids, _, _ in part])
            yield Sheet(ids, [picture for _, picture, _ in part], [q for _, _, q in part])
