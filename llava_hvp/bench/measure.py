"""Rounds in which every variant takes its turn, and what comes of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_hvp.bench.phases import Bench
from llava_hvp.checkpoints.geometry import Vision
from llava_hvp.checkpoints.variants import Floor, Variant
from llava_hvp.encoder.vit import read_geometry
from llava_hvp.pruning.report import ImageReport
from llava_hvp.runtime import PruningConfig

WARM_UP = 1  # rounds that are not counted
FEWEST = 2  # rounds, of which quartiles can be had

Samples = dict[str, list[float]]  # phase -> a number for each round


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Measurements:
    """One variant in one batch.

    Parameters
    ----------
    kept, stock : int
        visual tokens of all images of the batch, and as many as unpruned LLaVA sends
    projected, patches : int
        kept patches, and all patches of all tiles
    seconds : Samples
        phase -> one of each round
    floor : Samples
        the same of the floor below it, empty where it captures nothing
    peaks : dict[str, int]
        phase -> bytes
    layer_tokens : tuple[int, ...]
        visual tokens of all images that enter each layer of the language model; empty where none
        are dropped inside
    """

    variant: Variant
    kept: int
    stock: int
    projected: int
    patches: int
    seconds: Samples = field(default_factory=lambda: defaultdict(list))
    floor: Samples = field(default_factory=lambda: defaultdict(list))
    peaks: dict[str, int] = field(default_factory=dict)
    layer_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Turn:
    """What is run: a variant, or the floor below one."""

    bench: Bench
    variant: Variant
    of: Measurements
    is_floor: bool


def measure(
    benches: Sequence[Bench],
    variants: Sequence[Variant],
    rounds: int,
    *,
    tick: Callable[[str], None] = lambda what: None,
    most_seconds: float = float("inf"),
) -> list[list[Measurements]]:
    """Peaks and kept tokens of every variant on each bench, then `rounds` rounds of all of them.

    Each round starts with the next variant, a method follows right after its floor, and every
    bench takes its turn before the next variant does, so that a machine that slows down slows what
    is compared alike.

    Parameters
    ----------
    benches : Sequence[Bench]
        one for each host; for each a list comes back
    tick : Callable[[str], None]
        called with a word on what was done after every turn
    most_seconds : float
        no further round is begun once the next would end later; at least FEWEST are
    """
    began = time.perf_counter()
    groups: list[list[_Turn]] = []
    for variant, bench in itertools.product(variants, benches):
        measured, floor = _look(bench, variant)
        groups.append([])
        if floor is not None:
            below = (
                None if variant.pruning is None else PruningConfig(floor, variant.pruning.runtime)
            )
            groups[-1].append(_Turn(bench, Variant(below), measured, True))
        groups[-1].append(_Turn(bench, variant, measured, False))
        tick(f"memory of {_named(variant, bench, benches)}")
    for number in range(-WARM_UP, rounds):
        started = time.perf_counter()
        start = number % len(groups)
        for turn in (turn for group in groups[start:] + groups[:start] for turn in group):
            _take(turn, counted=number >= 0)
            name = _named(turn.of.variant, turn.bench, benches)
            tick(f"round {number + 1} of {rounds}: {name}")
        took = time.perf_counter() - started
        if number + 1 >= FEWEST and time.perf_counter() - began + took > most_seconds:
            break
    found = [group[-1].of for group in groups]
    return [found[number :: len(benches)] for number in range(len(benches))]


def _named(variant: Variant, bench: Bench, benches: Sequence[Bench]) -> str:
    return f"{variant}, {bench.checkpoint.host}" if len(benches) > 1 else str(variant)


def turns(variants: Sequence[Variant], rounds: int, vision: Vision) -> int:
    """How often `measure` ticks for each bench."""
    turns_a_round = sum(1 + variant.has_floor(vision) for variant in variants)
    return len(variants) + (rounds + WARM_UP) * turns_a_round


def _look(bench: Bench, variant: Variant) -> tuple[Measurements, Floor | None]:
    """What a variant keeps and how much memory it takes; this warms up as well."""
    with bench.checkpoint.pruned_by(variant) as pruning:
        prepared = bench.prepare()
        peaks = bench.peaks(pruning)
        floor = None
        if pruning is None:
            work = bench.work
            tokens = prepared["inputs_embeds"].shape[1] - work.text_tokens
            patches = work.tiles * read_geometry(bench.checkpoint.vit).patches
            measured = Measurements(variant, *(work.batch * tokens,) * 2, *(patches,) * 2)
        else:
            reports = list(pruning.last)  # of the peaks' answer: its prompt has run
            measured = Measurements(
                variant,
                sum(report.kept_tokens for report in reports),
                sum(report.stock_tokens for report in reports),
                sum(report.kept_patches for report in reports),
                sum(report.sent.numel() for report in reports),
            )
            layers = zip(*(report.layer_tokens for report in reports), strict=True)
            measured.layer_tokens = tuple(map(sum, layers))
            if variant.has_floor(bench.vision):
                floor = _floor(pruning, reports)
        measured.peaks = peaks
    return measured, floor


def _floor(pruning: Any, reports: Sequence[ImageReport]) -> Floor:
    """What takes as long as the kept tokens alone do.

    Where a method prunes inside the language model: `random` at the tower, which sends as many
    patches as enter a layer on average.
    """
    if not reports[0].layer_tokens:
        return Floor.below(pruning.method, torch.cat([r.selection.keep for r in reports]))
    drawn = torch.Generator().manual_seed(0)
    keeps = []
    for report in reports:
        share = report.average_tokens / report.kept_tokens
        places = report.sent.flatten().nonzero()[:, 0]
        chosen = torch.randperm(len(places), generator=drawn)
        keep = torch.zeros(report.sent.numel(), dtype=torch.bool)
        keep[places[chosen[: max(1, round(share * len(places)))]]] = True
        keeps.append(keep.view_as(report.sent))
    return Floor(keep=torch.cat(keeps), r_max=0.5)


def _take(turn: _Turn, *, counted: bool) -> None:
    bench = turn.bench
    with bench.checkpoint.pruned_by(turn.variant) as pruning:
        parts = bench.time_parts(pruning)
        # Past its first token the floor does what the method does.
        answer = bench.time_answer(1 if turn.is_floor else bench.work.new_tokens)
    if counted:
        samples = turn.of.floor if turn.is_floor else turn.of.seconds
        for phase, seconds in (parts | answer).items():
            samples[phase].append(seconds)
