"""What a choice of patches costs, and what of it half precision leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_hvp.accuracy.exam import Sheet
from llava_hvp.accuracy.store import Answers, Chosen
from llava_hvp.bench.clock import Clock
from llava_hvp.bench.phases import time_encode
from llava_hvp.bench.workload import Workload
from llava_hvp.checkpoints.dtypes import dtype_of
from llava_hvp.checkpoints.variants import Floor, Variant
from llava_hvp.console import say
from llava_hvp.errors import ScoreError
from llava_hvp.pruning.shared import SharedRuns
from llava_hvp.runtime import PruningConfig

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

PICTURES = 64  # evenly from all that questions are asked about
HALVES = ("float16", "bfloat16")  # what is compared with float32


@dataclass(frozen=True)
class Opened:
    """A checkpoint in float32, and in what half precisions the device can compute it.

    Parameters
    ----------
    halves : Mapping[str, Checkpoint]
        by the dtype's name, of HALVES
    """

    exact: Checkpoint
    halves: Mapping[str, Checkpoint]

    @classmethod
    def of(
        cls, exact: Checkpoint, sheet: Sheet, reopened: Callable[[torch.dtype], Checkpoint]
    ) -> Opened:
        """Those of HALVES in which the tower encodes this sheet; says which it does not, and why.

        Parameters
        ----------
        reopened : Callable[[torch.dtype], Checkpoint]
            the same checkpoint in another dtype
        """
        halves = {}
        for name in HALVES:
            half = reopened(dtype_of(name))
            half.vit.to(half.dtype)  # LLaVA's loader may leave it in float32
            try:
                _Inputs.of(half, sheet).prepare()
            except RuntimeError as error:
                if "not implemented for" not in str(error):
                    raise
                say(f"no stability in {name}, which {half.model.device} does not compute: {error}")
            else:
                halves[name] = half
        return cls(exact, halves)


def spread(asked: Sequence[Any]) -> list[Any]:
    """PICTURES of what is asked, evenly; all where there are no more."""
    count = min(PICTURES, len(asked))
    return [asked[number * len(asked) // count] for number in range(count)]


def is_looked_at(variant: Variant) -> bool:
    """Whether all that it chooses is chosen at the vision tower."""
    return variant.prunes and variant.pruning is not None and variant.pruning.inside is None


def look(
    opened: Callable[[Sheet], Opened],
    sheets: Sequence[Sheet],
    variants: Sequence[Variant],
    answers: Answers,
    tick: Callable[[int], None] = lambda looks: None,
) -> None:
    """Put into `answers` what every variant chooses on every sheet, each variant in its turn.

    Variants that choose inside the language model are passed over.

    Parameters
    ----------
    opened : Callable[[Sheet], Opened]
        called once, with the first sheet that was not looked at yet
    tick : Callable[[int], None]
        called with 1 after every variant of every sheet
    """
    models: Opened | None = None
    for number, sheet in enumerate(sheets):
        looks: dict[str, _Look] = {}  # by how pictures are cut
        for variant in filter(is_looked_at, variants):
            if answers.chosen(number, str(variant)) is None:
                models = models or opened(sheet)
                tiling = variant.runtime.tiling
                if tiling not in looks:
                    looks[tiling] = _Look.of(models, sheet, variant)
                answers.add_chosen(number, str(variant), looks[tiling].at(variant))
            tick(1)


@dataclass(frozen=True)
class _Inputs:
    """A sheet as the inputs of one model, and what its tower gave."""

    opened: Checkpoint
    work: Workload
    runs: SharedRuns = field(default_factory=SharedRuns)

    @classmethod
    def of(cls, opened: Checkpoint, sheet: Sheet, variant: Variant | None = None) -> _Inputs:
        sizes: list[Any] = [picture.size for picture in sheet.pictures]
        images = opened.images(sheet.pictures, variant)
        return cls(opened, Workload(sheet.ids, images, sizes, new_tokens=1))

    @torch.inference_mode()
    def prepare(self) -> None:
        """All that comes before the language model."""
        self.opened.prepare(self.work.ids, self.work.images, self.work.sizes)

    def keep(self, pruning: PruningConfig) -> Tensor:
        """(T, N) bool, on the CPU: what is kept where the tower's attention is its own."""
        stock = replace(pruning, runtime=replace(pruning.runtime, tower_attention="stock"))
        # A method reads the same at all its budgets: half precision is slow on many a CPU.
        with self.opened.pruned_by(stock) as pruned, self.runs.on(pruned.host_model.encoder):
            self.prepare()
            return torch.cat([report.selection.keep for report in pruned.last])

    def seconds(self, pruning: PruningConfig) -> float:
        """Of the image encode as it is run otherwise, nothing remembered."""
        clock = Clock(self.opened.model.device)
        with self.opened.pruned_by(pruning) as pruned:
            return time_encode(self.opened, self.work, pruned, clock)[1]


@dataclass(frozen=True)
class _Look:
    """A sheet as inputs in float32, and in half precisions by name."""

    exact: _Inputs
    halves: Mapping[str, _Inputs]

    @classmethod
    def of(cls, opened: Opened, sheet: Sheet, variant: Variant) -> _Look:
        halves = {name: _Inputs.of(half, sheet, variant) for name, half in opened.halves.items()}
        return cls(_Inputs.of(opened.exact, sheet, variant), halves)

    def at(self, variant: Variant) -> Chosen:
        """What a variant chooses."""
        pruning = variant.pruning
        assert pruning is not None
        kept = self.exact.keep(pruning)
        common = {}
        for name, half in self.halves.items():
            try:
                common[name] = int((kept & half.keep(pruning)).sum())
            except ScoreError as error:
                say(f"{variant} chooses nothing in {name}: {error}")
        # A method follows right after its floor, so that a machine that slows down slows both.
        floor = replace(pruning, method=Floor.below(pruning.method, kept))
        seconds = [self.exact.seconds(turn) for turn in (floor, pruning)]
        return Chosen(int(kept.sum()), common, *seconds)
