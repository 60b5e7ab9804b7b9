"""Measurements as rows: numbers, and ratios to `none` and to the floor in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_hvp.bench.flops import Flops, as_published, complete
from llava_hvp.bench.measure import Measurements, Samples, Spread
from llava_hvp.bench.workload import Workload
from llava_hvp.checkpoints.geometry import LlavaGeometry

# Of the seconds of one round, what is reported. Speeds are tokens/s of the whole batch.
TIMES = ("encode", "prefill", "ttft")
SPEEDS = ("decode", "answer")
WORDS = {
    "encode": "image encode",
    "prefill": "prefill",
    "ttft": "TTFT",
    "decode": "decode speed",
    "answer": "answer speed",
}


@dataclass(frozen=True)
class BenchRow:
    """One variant on one host in one batch.

    Parameters
    ----------
    host : str
        whose classes the model is of: llava or transformers
    tiles : int
        of the whole batch
    kept_tokens, stock_tokens : float
        of one image, mean
    layer_tokens : list[int]
        those that enter each layer of the language model; empty where none are dropped inside
    average_tokens : float
        of one image, averaged over the layers
    kept_of_patches : float
        kept patches / (N x tiles), what r_max bounds
    seconds : dict[str, Spread]
        encode (selection included), prefill, ttft
    selection : Spread | None
        seconds that the encode takes longer than the floor's; None where nothing is read, or where
        a method prunes inside the language model
    tokens_per_second : dict[str, Spread]
        decode (after the first token), answer (the whole of it)
    launch_share : float
        of the prefill, during which the host was still launching kernels
    to_none, to_floor : dict[str, Spread]
        phase -> ratio of each round; times below 1 are a gain, speeds above 1
    peak_bytes : dict[str, int]
        above the model and its inputs, of encode, prefill, answer
    flops : Flops
        of one image and prompt, all that is done
    flops_published : float | None
        by the papers' convention, LLaVA-1.5 only
    """

    host: str
    method: str
    options: str
    batch: int
    tiles: int
    rounds: int
    kept_tokens: float
    stock_tokens: float
    layer_tokens: list[int]
    average_tokens: float
    kept_of_patches: float
    seconds: dict[str, Spread]
    selection: Spread | None
    tokens_per_second: dict[str, Spread]
    launch_share: float
    to_none: dict[str, Spread]
    to_floor: dict[str, Spread]
    selection_of_floor_ttft: Spread | None
    peak_bytes: dict[str, int]
    peak_to_none: dict[str, float]
    flops: Flops
    flops_published: float | None

    @property
    def label(self) -> str:
        """As hivtp r_max=0.5."""
        return f"{self.method} {self.options}".strip()


def rows_of(
    measured: Sequence[Measurements], work: Workload, geometry: LlavaGeometry, host: str
) -> list[BenchRow]:
    """One row a variant of one host; the first is its `none`."""
    none = measured[0]
    rates = {id(m): _rates(m.seconds, work) for m in measured}
    return [_row(m, none, rates[id(m)], rates[id(none)], work, geometry, host) for m in measured]


def beside(rows: Sequence[Sequence[BenchRow]]) -> list[BenchRow]:
    """Rows of several hosts as one list, those of a variant side by side."""
    return [row for same in zip(*rows, strict=True) for row in same]


def hosts_of(rows: Sequence[BenchRow]) -> list[str]:
    """The hosts in the order of their rows."""
    return list(dict.fromkeys(row.host for row in rows))


def _rates(seconds: Samples, work: Workload) -> Samples:
    """Tokens/s of the batch in each round."""
    tokens = work.batch * work.new_tokens
    later = tokens - work.batch
    times = list(zip(seconds["answer"], seconds["ttft"], strict=True))
    return {
        "decode": [later / (answer - ttft) for answer, ttft in times] if later else [],
        "answer": [tokens / answer for answer, _ in times],
    }


def _row(
    measured: Measurements,
    none: Measurements,
    rates: Samples,
    none_rates: Samples,
    work: Workload,
    geometry: LlavaGeometry,
    host: str,
) -> BenchRow:
    seconds, floor = measured.seconds, measured.floor
    vision = geometry.vision
    needs = measured.variant.needs(vision) if measured.variant.prunes else None
    # The floor of a method inside the language model sends other patches than it does.
    reads_tower = floor and not measured.layer_tokens
    selection = _each(lambda a, b: a - b, seconds["encode"], floor["encode"]) if reads_tower else []
    shares = _each(lambda s, ttft: s / ttft, selection, floor["ttft"]) if reads_tower else []
    to_none = {name: _each(_ratio, seconds[name], none.seconds[name]) for name in TIMES}
    to_none |= {name: _each(_ratio, rates[name], none_rates[name]) for name in SPEEDS}
    to_floor = {name: _each(_ratio, seconds[name], floor[name]) for name in TIMES if floor}
    kept = measured.kept / work.batch
    tokens: int | list[int] = round(kept)
    if measured.layer_tokens:
        tokens = [round(count / work.batch) for count in measured.layer_tokens]
    pruning = measured.variant.pruning
    flops = complete(
        geometry,
        tokens,
        text_tokens=work.text_tokens,
        projected=measured.projected // work.batch,
        tiles=work.tiles // work.batch,
        # Stock runs every layer of its tower.
        layers_run=vision.layers if needs is None else vision.select,
        layers_read=0 if needs is None else len({*needs.received_attention, *needs.cls_attention}),
        inside=None if pruning is None else pruning.inside,
        text_behind=work.text_behind,
        new_tokens=work.new_tokens,
    )
    return BenchRow(
        host=host,
        method=measured.variant.name,
        options=measured.variant.options,
        batch=work.batch,
        tiles=work.tiles,
        rounds=len(seconds["ttft"]),
        kept_tokens=kept,
        stock_tokens=measured.stock / work.batch,
        layer_tokens=tokens if isinstance(tokens, list) else [],
        average_tokens=statistics.mean(measured.layer_tokens or [measured.kept]) / work.batch,
        kept_of_patches=measured.projected / measured.patches,
        seconds={name: Spread.of(seconds[name]) for name in TIMES},
        selection=Spread.of(selection) if selection else None,
        tokens_per_second=_spreads(rates),
        launch_share=Spread.of(_each(_ratio, seconds["launched"], seconds["prefill"])).median,
        to_none=_spreads(to_none),
        to_floor=_spreads(to_floor),
        selection_of_floor_ttft=Spread.of(shares) if shares else None,
        peak_bytes=dict(measured.peaks),
        peak_to_none={name: b / none.peaks[name] for name, b in measured.peaks.items()},
        flops=flops,
        flops_published=None
        if geometry.is_next
        else as_published(geometry, tokens, text_tokens=work.text_tokens),
    )


def _ratio(a: float, b: float) -> float:
    return a / b


def _each(
    of: Callable[[float, float], float], a: Sequence[float], b: Sequence[float]
) -> list[float]:
    return [of(x, y) for x, y in zip(a, b, strict=True)]


def _spreads(samples: Samples) -> dict[str, Spread]:
    return {name: Spread.of(values) for name, values in samples.items() if values}


def losses(rows: Sequence[BenchRow]) -> list[str]:
    """Where pruning takes longer than unpruned LLaVA, a line a variant."""
    lines = []
    for row in rows:
        worse = [
            f"{WORDS[name]} {spread.median:.3f}"
            + " (quartiles on both sides of 1)" * (spread.low <= 1 <= spread.high)
            for name, spread in row.to_none.items()
            if (spread.median < 1 if name in SPEEDS else spread.median > 1)
        ]
        if worse:
            lines.append(f"{_named(row, rows)}, batch {row.batch}: {', '.join(worse)}")
    return lines


def _named(row: BenchRow, rows: Sequence[BenchRow]) -> str:
    return f"{row.label} on {row.host}" if len(hosts_of(rows)) > 1 else row.label


def losses_to_floor(rows: Sequence[BenchRow]) -> list[str]:
    """Where pruning inside the language model takes longer than `random` at the same average."""
    lines = []
    for row in rows:
        slower = [
            f"{WORDS[name]} {row.to_floor[name].median:.3f}"
            for name in ("prefill", "ttft")
            if row.layer_tokens and row.to_floor[name].median > 1
        ]
        if slower:
            lines.append(f"{_named(row, rows)}, batch {row.batch}: {', '.join(slower)}")
    return lines
