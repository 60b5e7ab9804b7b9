"""One question about one picture, answered unpruned and by several methods at several budgets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_hvp.checkpoints.variants import Variant, variants
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.pruning.report import ImageReport
from llava_hvp.show.overlay import overlay

CARD = 420  # pixels, the width of an overlay


@dataclass(frozen=True)
class Answer:
    """What one method at one budget came to; of an error only the label and the reason.

    Parameters
    ----------
    seconds : float
        from the picture to the end of the answer
    tokens : float
        visual tokens that enter a layer of the language model, averaged over all
    drawn : Any
        a PIL picture of what is kept, unpruned the picture itself
    """

    label: str
    said: str = ""
    seconds: float = 0.0
    tokens: float = 0.0
    stock_tokens: int = 0
    drawn: Any = None
    error: str = ""


def answers(
    viewer: Viewer,
    image: Any,
    question: str,
    methods: Sequence[str],
    r_max: Sequence[float],
    new_tokens: int,
) -> Iterator[Answer]:
    """Unpruned first, then each method at each budget, each as soon as it is there.

    What a method cannot do is its own answer's error, and the others go on. Raises OptionError
    where nothing can be asked at all.
    """
    if image is None:
        raise OptionError("There is no picture: drop one, or take one of the examples.")
    if not question.strip():
        raise OptionError("There is no question: type one.")
    picture, ids = image.convert("RGB"), viewer.prompt(question.strip())
    yield _answer(viewer, Variant(), picture, ids, new_tokens)
    for method in methods:
        for budget in r_max:
            try:
                (_, variant) = variants([method], [{"r_max": budget}])
                yield _answer(viewer, variant, picture, ids, new_tokens)
            except LlavaHvpError as error:
                yield Answer(f"{method} r_max={budget}", error=str(error))


def _answer(viewer: Viewer, variant: Variant, picture: Any, ids: Any, new_tokens: int) -> Answer:
    started = time.perf_counter()
    said, report = viewer.answer(variant, picture, ids, new_tokens)
    seconds = time.perf_counter() - started
    if report is None:
        return _made("unpruned", said, seconds, viewer.look(None, picture, ids), picture)
    label = str(variant)
    return _made(label, said, seconds, report, _drawn(report, picture))


def _drawn(report: ImageReport, picture: Any) -> Any:
    """What is kept, alone: the picture has a card of its own."""
    return overlay(report, picture, title="kept", original=False, widest=CARD)


def _made(label: str, said: str, seconds: float, report: ImageReport, drawn: Any) -> Answer:
    return Answer(label, said, seconds, report.average_tokens, report.stock_tokens, drawn)
