"""The search: every candidate on one half of the questions, coarse to fine, the best on the other.

What is measured lies in a `Measured`; what is there already is not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_hvp.checkpoints.variants import Variant
from llava_hvp.encoder.vit import read_geometry
from llava_hvp.runtime import PruningConfig
from llava_hvp.tune.candidates import Model, Space
from llava_hvp.tune.divergence import Answered
from llava_hvp.tune.questions import Sheet
from llava_hvp.tune.store import Measured

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

CHOOSING, JUDGING = "choosing", "judging"
Bar = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
ROUNDS = 3  # of finer candidates around the best
FINALISTS = 3  # of each space that are judged, beside the default
UNPRUNED = Variant()


def silent(total: int, half: str) -> AbstractContextManager[Callable[[int], None]]:
    """No bar."""
    return nullcontext(lambda done: None)


@dataclass
class Field:
    """A model, its questions, and what is known of candidates.

    Parameters
    ----------
    sheets : dict[str, list[Sheet]]
        of each half
    unpruned : Variant
        what candidates are compared with
    new_tokens : int
        of an answer, at most
    bar : Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
        of the number of candidates and sheets, and the half; gives what is called with how many
        more are done
    """

    opened: Checkpoint
    sheets: dict[str, list[Sheet]]
    measured: Measured
    unpruned: Variant = UNPRUNED
    new_tokens: int = 32
    bar: Bar = silent

    def measure(self, half: str, candidates: Sequence[PruningConfig]) -> None:
        """Measure what is not known yet of these candidates, each once."""
        wanted = list({str(each): each for each in candidates}.values())
        missing = {
            number: [c for c in wanted if self.measured.find(half, number, c) is None]
            for number in range(len(self.sheets[half]))
        }
        with self.bar(sum(map(len, missing.values())), half) as more:
            for number in (number for number, own in missing.items() if own):
                sheet, own = self.sheets[half][number], missing[number]
                answered = Answered(self.opened, sheet, self.unpruned, self.new_tokens)
                for candidate, moved in zip(own, answered.moved_by(own), strict=True):
                    self.measured.add(half, number, candidate, moved)
                    more(1)

    def kl(self, half: str, candidate: PruningConfig) -> float:
        """Its mean divergence on a half."""
        found = [kl for moved in self.measured.of(half, candidate) for kl in moved.kl]
        return sum(found) / len(found)

    def ranked(self, half: str, candidates: Sequence[PruningConfig]) -> list[PruningConfig]:
        """The least moving first; of equal ones those that come first here."""
        return sorted(candidates, key=lambda each: self.kl(half, each))

    def seconds(self, candidate: PruningConfig) -> tuple[float, float]:
        """Of a question alone, and of a candidate on it; the first sheet's, once it is warm."""
        sheet = self.sheets[CHOOSING][0]
        for _ in range(2):
            started = time.perf_counter()
            answered = Answered(self.opened, sheet, self.unpruned, self.new_tokens)
            begun = time.perf_counter()
            list(answered.moved_by([candidate]))
            ended = time.perf_counter()
        return (begun - started) / len(sheet.asked), (ended - begun) / len(sheet.asked)


def search(field: Field, spaces: Sequence[Space]) -> dict[str, list[PruningConfig]]:
    """Candidates of each space, the best first; those that are judged are measured on both halves.

    Parameters
    ----------
    spaces : Sequence[Space]
        that are searched side by side, since they share each run of the tower
    """
    tried: dict[str, list[PruningConfig]] = {str(space): [] for space in spaces}
    new = {str(space): space.first() for space in spaces}
    for _ in range(ROUNDS + 1):
        field.measure(CHOOSING, [each for found in new.values() for each in found])
        for space in spaces:
            name = str(space)
            tried[name] = field.ranked(CHOOSING, [*tried[name], *new[name]])
            known = {str(each) for each in tried[name]}
            new[name] = [each for each in space.near(tried[name]) if str(each) not in known]
        if not any(new.values()):
            break
    field.measure(JUDGING, [each for space in spaces for each in judged(space, tried[str(space)])])
    return tried


def judged(space: Space, ranked: Sequence[PruningConfig]) -> list[PruningConfig]:
    """Those that the other half is asked about: the default, and the best."""
    found = {str(each): each for each in (space.default(), *ranked[:FINALISTS])}
    return list(found.values())


def model_of(opened: Checkpoint) -> Model:
    """The shape of a checkpoint."""
    geometry = read_geometry(opened.vit)
    return Model(
        geometry.depth,
        geometry.normalised(opened.select_layer),
        geometry.grid,
        len(opened.decoder.layers),  # type: ignore[arg-type]
    )
