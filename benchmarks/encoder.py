"""Time and peak memory of the vision encoder with pruning, as ratios to stock LLaVA.

    python benchmarks/encoder.py [--tiles 1,5] [--rounds 15]
        [--out benchmarks/results/encoder-cpu.md]

One CLIP ViT-L/14-336 tower with random weights, in float32 on the CPU. Stock is the `forward` of
LLaVA's own `CLIPVisionTower`, which runs all 24 layers and keeps every hidden state; the others
are `PrunedCLIPVisionTower.encode` of that same loaded tower, adopted before each turn and released
after it, capture and selection included. Both must give the same bits before anything is timed.

Time: every round runs all variants one after the other, each round starting with the next one. A
ratio divides by stock's time in the same round, so that a slow phase of the machine falls on both;
medians and quartiles are over the rounds. Wall time is the goal's. CPU time, of all threads, is
what a busy machine disturbs least, but counts threads that wait: set OMP_WAIT_POLICY=PASSIVE.

Memory: the most bytes alive at once during one encode, above the resting state (weights and
images), from every allocation and release that torch's CPU allocator reports to its profiler: the
same number in every run, with the temporaries inside operators, which a dispatch mode would miss.
Peak RSS adds MKL's workspace and what malloc has not given back; told to give back at once
(MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_), it was within 2 MB of these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava_hvp.host.tower import PrunedCLIPVisionTower
from llava_hvp.methods import get_method
from llava_hvp.methods.base import Needs

SIDE = 336
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": SIDE,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
STOCK = "stock"
TIME_GOALS = {STOCK: "", "hivtp": "<= 1.02", "hiprune": "<= 1.00", "random": ""}
MEMORY_GOAL = "<= 1.05"
HEADER = (
    *("tiles", "encoder", "layers read", "wall time, s", "wall / stock", "goal"),
    *("CPU time / stock", "peak memory, MB", "memory / stock", "goal"),
)

Encode = Callable[[Tensor], Tensor]  # images (T, 3, H, W) -> features (T, N, D)


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One variant on one number of tiles; ratios are to stock."""

    tiles: int
    variant: str
    layers_read: int
    wall_seconds: Quartiles
    wall_ratio: Quartiles
    cpu_ratio: Quartiles
    peak_bytes: int
    memory_ratio: float

    def cells(self) -> tuple[str, ...]:
        wall, cpu, memory = str(self.wall_ratio), str(self.cpu_ratio), f"{self.memory_ratio:.3f}"
        if self.variant == STOCK:
            wall = cpu = memory = "1"
        return (
            *(str(self.tiles), self.variant, str(self.layers_read), str(self.wall_seconds)),
            *(wall, TIME_GOALS[self.variant], cpu, f"{self.peak_bytes / 1e6:.1f}", memory),
            "" if self.variant == STOCK else MEMORY_GOAL,
        )


def make_tower(folder: str) -> CLIPVisionTower:
    """LLaVA's own tower, loaded from a CLIP-L/336 checkpoint with random weights."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP_L_336)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    # -2: what every released LLaVA-1.5 and LLaVA-NeXT checkpoint selects.
    return CLIPVisionTower(folder, SimpleNamespace(mm_vision_select_layer=-2))


@contextmanager
def as_variant(tower: CLIPVisionTower, variant: str) -> Iterator[Encode]:
    """What encodes images: the tower's own forward, or a method's `encode` on the same tower."""
    if variant == STOCK:
        yield tower.forward
        return
    PrunedCLIPVisionTower.adopt(tower, get_method(variant))
    try:
        yield lambda images: tower.encode(images, (len(images),)).features
    finally:
        tower.release()


def layers_read(variant: str) -> int:
    """Layers whose attention is captured."""
    depth = CLIP_L_336["num_hidden_layers"]
    needs = Needs() if variant == STOCK else get_method(variant).needs(depth, depth - 1)
    return len({*needs.received, *needs.cls})


def peak_bytes(encode: Encode, images: Tensor) -> int:
    """The most bytes that one call holds at once, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        features = encode(images)
    del features
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def seconds(encode: Encode, images: Tensor) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    encode(images)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(tower: CLIPVisionTower, tiles: int, rounds: int) -> Iterator[Row]:
    """One row for each variant, stock first."""
    variants = tuple(TIME_GOALS)
    images = torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(tiles))
    expected, peaks = tower(images), {}
    for variant in variants:
        with as_variant(tower, variant) as encode:
            if not torch.equal(encode(images), expected):
                raise SystemExit(f"{variant}: features of {tiles} tiles differ from stock's")
            peaks[variant] = peak_bytes(encode, images)
    del expected
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for number in range(-1, rounds):  # round -1 warms up
        start = number % len(variants)
        for variant in variants[start:] + variants[:start]:
            with as_variant(tower, variant) as encode:
                times[variant].append(seconds(encode, images))
    stock_wall, stock_cpu = zip(*times[STOCK][1:], strict=True)
    for variant in variants:
        wall, cpu = zip(*times[variant][1:], strict=True)
        yield Row(
            tiles,
            variant,
            layers_read(variant),
            Quartiles.of(wall),
            Quartiles.of([a / b for a, b in zip(wall, stock_wall, strict=True)]),
            Quartiles.of([a / b for a, b in zip(cpu, stock_cpu, strict=True)]),
            peaks[variant],
            peaks[variant] / peaks[STOCK],
        )


def markdown(environment: dict[str, str], rounds: int, rows: Sequence[Row]) -> str:
    """The command and the machine first, then a table."""
    table = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    about = (
        f"{environment['machine']}; {environment['versions']}. CLIP-L/336 with random weights in "
        f"float32, r_max 0.5; medians with quartiles over {rounds} rounds, ratios to stock of the "
        "same round."
    )
    lines = (f"    {environment['command']}", "", about, "")
    return "\n".join((*lines, *("| " + " | ".join(cells) + " |" for cells in table))) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiles", default="1,5", help="numbers of tiles, separated by commas")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    parser.add_argument("--out", type=Path, help="Markdown file; the same as JSON goes beside it")
    options = parser.parse_args(arguments)
    try:
        options.tiles = [int(tiles) for tiles in options.tiles.split(",")]
    except ValueError:
        parser.error(f"--tiles {options.tiles}: give numbers separated by commas, as 1,5")
    if min(options.tiles) < 1 or options.rounds < 2:
        parser.error("give --tiles of at least 1 and --rounds of at least 2")
    return options


def main() -> None:
    options = parse()
    machine = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    waiting = f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    environment = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{machine}, {torch.get_num_threads()} torch threads, {waiting}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    with tempfile.TemporaryDirectory() as folder:
        tower = make_tower(folder)
        rows = [row for tiles in options.tiles for row in measure(tower, tiles, options.rounds)]
    text = markdown(environment, options.rounds, rows)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
        content = environment | {"rounds": options.rounds, "rows": [asdict(row) for row in rows]}
        beside = options.out.with_suffix(".json")
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
