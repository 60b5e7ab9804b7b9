"""The work of `llava-hvp tune`: opens the model, says how long it takes, searches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from llava_hvp.console import say
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint
from llava_hvp.tune.agreement import GRID, Curve, curve
from llava_hvp.tune.candidates import Space
from llava_hvp.tune.questions import sheets_of
from llava_hvp.tune.search import CHOOSING, JUDGING, ROUNDS, Bar, Field, model_of, search
from llava_hvp.tune.settings import TuneSettings
from llava_hvp.tune.store import Measured
from llava_hvp.tune.tables import Found


@contextmanager
def field_of(settings: TuneSettings, measured: Measured, bar: Bar) -> Iterator[Field]:
    """The model and its questions, in batches."""
    # LLaVA comes only now: whatever was typed wrong has been said.
    from llava_hvp.checkpoints.opening import open_checkpoint

    halves = settings.halves
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        opened = open_checkpoint(
            settings.model_path or str(checkpoint(folder, settings.model)),
            settings.device,
            base=settings.model_base,
            bits=settings.bits,
            conv_mode=settings.conv_mode,
        )
        asked = {CHOOSING: halves.choosing, JUDGING: halves.judging}
        sheets = {half: sheets_of(opened, own, settings.batch) for half, own in asked.items()}
        yield Field(opened, sheets, measured, settings.unpruned, settings.new_tokens, bar)


def options_found(settings: TuneSettings, field: Field) -> list[Found]:
    """The best options of each method at each budget."""
    shape = model_of(field.opened)
    spaces = [
        Space(method, budget, shape, settings.fixed.get(method, {}))
        for method in settings.methods
        for budget in settings.budgets
    ]
    first = [candidate for space in spaces for candidate in space.first()]
    # What is near the best is not known yet: as much again at most, as a rule.
    _say_how_long(field, first, len(first), 4 * len(spaces))
    tried = search(field, spaces)
    return [Found.of(field, space, tried[str(space)]) for space in spaces]


def curves_of(settings: TuneSettings, field: Field) -> list[Curve]:
    """Agreement of each method by budget."""
    shape, methods = model_of(field.opened), settings.methods

    def at(method: str, r_max: float) -> PruningConfig:
        return Space(method, {"r_max": r_max}, shape, settings.fixed.get(method, {})).default()

    assert settings.agreement is not None
    first = [at(methods[0], GRID[0])] * len(GRID) * len(methods)
    _say_how_long(field, first, 2 * len(methods), len(methods))
    return [curve(field, method, settings.agreement, partial(at, method)) for method in methods]


def _say_how_long(field: Field, first: Sequence[PruningConfig], finer: int, finalists: int) -> None:
    """An estimate, from the first sheet."""
    alone, each = field.seconds(first[0])
    count = {half: sum(len(s.asked) for s in own) for half, own in field.sheets.items()}
    most = (alone * ROUNDS + each * (len(first) + finer)) * count[CHOOSING]
    most += (alone + each * finalists) * count[JUDGING]
    say(
        f"{len(first)} candidates first, then finer ones around the best, on {count[CHOOSING]} "
        f"questions; the best on {count[JUDGING]} others: some {_time(most)}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
