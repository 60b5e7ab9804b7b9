"""`llava-hvp bench`: time, memory and FLOPs of pruned LLaVA beside unpruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.bench import subject
from llava_hvp.bench.workload import make_workload, pattern
from llava_hvp.checkpoints.dtypes import DTYPES
from llava_hvp.checkpoints.geometry import list_geometries
from llava_hvp.cli import fit
from llava_hvp.cli.arguments import (
    add_budgets,
    add_loading,
    add_tuned,
    progress,
    write_results,
)
from llava_hvp.cli.bench_settings import BUDGETS, METHODS, BenchSettings, compared, parse
from llava_hvp.cli.parser import add_command
from llava_hvp.errors import OptionError
from llava_hvp.lazy import torch
from llava_hvp.methods import list_methods
from llava_hvp.tables import MARKDOWN, TERMINAL

if TYPE_CHECKING:
    from llava_hvp.bench.results import BenchRow

EXAMPLES = (
    "llava-hvp bench --geometry llava-1.5-tiny --methods hivtp,random --r-max 0.5 "
    "--rounds 2 --new-tokens 4 --device cpu",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "bench",
        "measure time, memory and FLOPs beside unpruned LLaVA",
        "Unpruned and pruned take turns in one process; no weights are needed with "
        "--geometry. The -7b shapes want a GPU, -160m a minute or two of a CPU, -tiny "
        "seconds.",
        EXAMPLES,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--geometry",
        metavar="NAME",
        help=f"random weights in a published shape: {', '.join(list_geometries())}",
    )
    what.add_argument(
        "--fit",
        metavar="8GB",
        help="instead of measuring: work out from the shapes of one --geometry or several what "
        "batch and prompt fit into so much memory; GB are 10^9 bytes, GiB 2^30",
    )
    what.add_argument(
        "--host",
        metavar="HOST,HOST",
        help=f"with --geometry: whose classes, of {', '.join(subject.HOSTS)}; several take turns "
        "with the same weights; llava by default",
    )
    what.add_argument("--model-path", help="instead: a LLaVA checkpoint")
    add_loading(what)
    what.add_argument(
        "--dtype", choices=DTYPES, help="float16 on a GPU and when quantised, float32 on a CPU"
    )
    what.add_argument(
        "--tower-dtype",
        choices=DTYPES,
        help="with --geometry; by default as LLaVA's scripts leave the tower: float32 for 1.5, "
        "--dtype for NeXT; of --host transformers --dtype",
    )
    how = parser.add_argument_group("how it is pruned")
    how.add_argument(
        "--methods",
        help=f"of none, {', '.join(list_methods())}; none is always measured; {METHODS} by default",
    )
    add_tuned(how)
    add_budgets(how, BUDGETS)
    how.add_argument(
        "--prune-opt",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the methods that have it, repeatable",
    )
    how.add_argument(
        "--all-attentions",
        action="store_true",
        help="each method also with output_attentions in all layers, the released codes' way",
    )
    given = parser.add_argument_group("what is given to it")
    given.add_argument("--image-file", help="a picture; a pattern by default")
    given.add_argument("--image-size", metavar="WxH", help="of the pattern, 640x480 by default")
    given.add_argument(
        "--batch", default="1", metavar="B,B", help="prompts at a time, 1 by default"
    )
    given.add_argument("--prompt", default=subject.QUESTION, help="with --model-path")
    given.add_argument("--text-tokens", type=int, default=49, help="with --geometry, 49 by default")
    given.add_argument("--new-tokens", type=int, default=32, help="of an answer, 32 by default")
    rounds = parser.add_argument_group("how often")
    rounds.add_argument("--rounds", type=int, default=7, help="measured rounds, 7 by default")
    rounds.add_argument(
        "--max-seconds",
        type=float,
        default=float("inf"),
        help="stop short of --rounds (but not of two) after this time, shared by the batches",
    )
    rounds.add_argument(
        "--processor-time",
        action="store_true",
        help="on a CPU that others use too, with OMP_NUM_THREADS=1: time computed, not time passed",
    )
    rounds.add_argument("--seed", type=int, default=0)
    rounds.add_argument("--out", type=Path, metavar="FOLDER", help="for JSON, Markdown and a plot")
    parser.set_defaults(main=main)


def run(settings: BenchSettings) -> int:
    """Measure and print; the exit code."""
    pictures = _pictures(settings, max(settings.batches))
    # The model comes only now: whatever was typed wrong has been said.
    from llava_hvp.bench.machine import about
    from llava_hvp.bench.plot import plot, title_of
    from llava_hvp.bench.tables import render

    subjects = _subjects(settings)
    device, rows = torch.device(settings.device), []
    for batch in settings.batches:
        rows += _measure(settings, subjects, pictures[:batch])
    facts = about(
        device,
        f"{subject.about_all(subjects)}; {pictures[0].width} x {pictures[0].height} pixels, "
        f"{len(subjects[0].prompt) - 1} text tokens, {settings.new_tokens} new ones; medians over "
        f"{rows[0].rounds} rounds{', processor time' * settings.processor_time}.",
    )
    print(render(facts, rows, TERMINAL))
    if settings.out:
        bits = f"-{settings.bits}bit" if settings.bits else ""
        hosts = "" if settings.hosts == subject.HOSTS[:1] else f"-{'-'.join(settings.hosts)}"
        name = f"{subjects[0].name}{hosts}{bits}-{device.type}"
        write_results(
            settings.out / name,
            {**facts, "rows": [asdict(row) for row in rows]},
            render(facts, rows, MARKDOWN),
            partial(plot, title_of(facts), rows) if settings.plots else None,
        )
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    if args.fit is not None:
        return fit.run(fit.parse(args, compared(args)))
    return run(parse(args))


def _subjects(settings: BenchSettings) -> list[subject.Subject]:
    """One for each host."""
    if settings.geometry is not None:
        return subject.of_geometry(
            settings.geometry,
            settings.hosts,
            settings.device,
            settings.dtype,
            tower_dtype=settings.tower_dtype,
            bits=settings.bits,
            text_tokens=settings.text_tokens,
            seed=settings.seed,
        )
    assert settings.model_path is not None  # of the two, one is given
    opened = subject.of_checkpoint(
        settings.model_path,
        settings.model_base,
        settings.device,
        settings.dtype,
        bits=settings.bits,
        conv_mode=settings.conv_mode,
        question=settings.prompt,
    )
    return [opened]


def _pictures(settings: BenchSettings, count: int) -> list[Any]:
    if settings.image_file is None:
        return [pattern(settings.image_size, settings.seed + n) for n in range(count)]
    from PIL import Image

    try:
        return [Image.open(settings.image_file).convert("RGB")] * count
    except OSError as error:
        raise OptionError(f"--image-file {settings.image_file}: {error}") from error


def _measure(
    settings: BenchSettings, subjects: Sequence[subject.Subject], pictures: Sequence[Any]
) -> list[BenchRow]:
    """All rounds of one batch, of every host in turn."""
    from llava_hvp.bench.clock import Clock
    from llava_hvp.bench.measure import measure, turns
    from llava_hvp.bench.phases import Bench
    from llava_hvp.bench.results import beside, rows_of

    geometry = subjects[0].geometry
    vision = geometry.vision
    chosen = list(settings.variants)
    if settings.all_attentions:
        chosen += [replace(v, all_attentions=True) for v in chosen if v.captures(vision)]
    device, benches = torch.device(settings.device), []
    clock = Clock(device, processor=settings.processor_time)
    for what in subjects:
        work = make_workload(
            what.checkpoint,
            pictures,
            what.prompt,
            new_tokens=settings.new_tokens,
            variant=settings.variants[0],
        )
        benches.append(Bench(what.checkpoint, vision, work, clock))
    share = settings.max_seconds / len(settings.batches)
    total = turns(chosen, settings.rounds, vision) * len(benches)
    with progress(total, f"batch {len(pictures)}", "turn") as bar:
        measured = measure(benches, chosen, settings.rounds, tick=bar.named, most_seconds=share)
    return beside(
        [
            rows_of(own, bench.work, geometry, bench.checkpoint.host)
            for own, bench in zip(measured, benches, strict=True)
        ]
    )
