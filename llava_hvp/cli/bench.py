"""`llava-hvp bench`: time, memory and FLOPs of pruned LLaVA beside unpruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.bench import subject
from llava_hvp.bench.workload import make_workload, pattern
from llava_hvp.checkpoints.before_loading import check_before_loading, check_inside
from llava_hvp.checkpoints.dtypes import DTYPES, dtype_of
from llava_hvp.checkpoints.geometry import get_geometry, list_geometries
from llava_hvp.checkpoints.naming import named_path
from llava_hvp.checkpoints.variants import Variant, variants, with_tuned
from llava_hvp.cli import fit
from llava_hvp.cli.arguments import (
    add_budgets,
    add_tuned,
    at_least,
    bits_of,
    budgets,
    check_folder,
    device_of,
    exclude,
    listed,
    progress,
    tuned_of,
    whole,
    write_results,
)
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.cli.parser import add_command
from llava_hvp.errors import OptionError
from llava_hvp.hosts.hf.versions import check_release
from llava_hvp.lazy import torch
from llava_hvp.methods import NONE, list_methods
from llava_hvp.options import unpruned
from llava_hvp.tables import MARKDOWN, TERMINAL

if TYPE_CHECKING:
    from llava_hvp.bench.results import BenchRow

BUDGETS = "0.75,0.5,0.4,0.25"  # of r_max
METHODS = "none,hivtp,hiprune,random"

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
    what.add_argument("--model-base", help="as LLaVA's commands take it")
    what.add_argument(
        "--conv-mode", help="LLaVA's conversation template; by default what fits the name"
    )
    what.add_argument("--load-4bit", action="store_true")
    what.add_argument("--load-8bit", action="store_true")
    what.add_argument("--device", help="cuda where there is one, else cpu")
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


@dataclass(frozen=True)
class BenchSettings:
    """What `llava-hvp bench` measures, and how often.

    Parameters
    ----------
    geometry, model_path : str | None
        a published shape with random weights, or a checkpoint; one is None
    hosts : tuple[str, ...]
        whose classes random weights are of
    bits : int | None
        4 or 8 to quantise
    tower_dtype : torch.dtype | None
        of random weights; None as LLaVA's scripts leave the tower
    variants : tuple[Variant, ...]
        what is compared; the first is unpruned
    all_attentions : bool
        each method that reads the encoder also as the released codes do it
    image_size : tuple[int, int]
        (width, height) of the pattern that is shown where `image_file` is None
    batches : tuple[int, ...]
        prompts at a time
    text_tokens : int
        of the prompt of random weights; `prompt` is a checkpoint's
    max_seconds : float
        shared by the batches
    processor_time : bool
        count what this process computes in place of the time that passes
    out : Path | None
        folder of the results
    plots : bool
        whether a plot can be drawn there
    """

    geometry: str | None
    hosts: tuple[str, ...]
    model_path: str | None
    model_base: str | None
    conv_mode: str | None
    bits: int | None
    device: str
    dtype: torch.dtype
    tower_dtype: torch.dtype | None
    variants: tuple[Variant, ...]
    all_attentions: bool
    image_file: str | None
    image_size: tuple[int, int]
    batches: tuple[int, ...]
    prompt: str
    text_tokens: int
    new_tokens: int
    rounds: int
    max_seconds: float
    processor_time: bool
    seed: int
    out: Path | None
    plots: bool


def parse(args: argparse.Namespace) -> BenchSettings:
    """The settings; raises OptionError or LayerError for what is wrong, with nothing loaded."""
    from llava_hvp.bench.measure import FEWEST

    _check_subject(args)
    bits = bits_of(args)
    exclude(args, "image_file", "image_size")
    for name, least in (("rounds", FEWEST), ("new_tokens", 1), ("text_tokens", 2)):
        at_least(args, name, least)
    if not args.max_seconds > 0:
        raise OptionError(f"--max-seconds {args.max_seconds}: give a time above 0")
    check_folder(args.out)
    need("bench", "PIL", "sentencepiece", "google.protobuf")
    device = device_of(args.device)
    half = bits is not None or torch.device(device).type == "cuda"
    settings = BenchSettings(
        geometry=args.geometry,
        hosts=_hosts(args),
        model_path=None if args.model_path is None else named_path(args.model_path),
        model_base=args.model_base,
        conv_mode=args.conv_mode,
        bits=bits,
        device=device,
        dtype=dtype_of(args.dtype or ("float16" if half else "float32")),
        tower_dtype=dtype_of(args.tower_dtype) if args.tower_dtype else None,
        batches=tuple(listed(args.batch, whole, "--batch")),
        variants=_variants(args),
        all_attentions=args.all_attentions,
        image_file=args.image_file,
        image_size=_size(args.image_size or "640x480"),
        prompt=args.prompt,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        max_seconds=args.max_seconds,
        processor_time=args.processor_time,
        seed=args.seed,
        out=args.out,
        plots=args.out is not None and can_plot(),
    )
    _check_tower(settings)
    if settings.processor_time and (device != "cpu" or torch.get_num_threads() > 1):
        raise OptionError(
            f"--processor-time on {device} with {torch.get_num_threads()} threads: it is that of "
            "all threads of a CPU, so give --device cpu, and OMP_NUM_THREADS=1 before the command"
        )
    if settings.geometry is not None:
        layers = get_geometry(settings.geometry).language.layers
        for variant in settings.variants:
            check_inside(variant.pruning, layers)
    if settings.model_path is not None:
        check_before_loading(settings.model_path, [v.pruning for v in settings.variants])
    return settings


def _check_subject(args: argparse.Namespace) -> None:
    """Raise OptionError unless one model is asked for."""
    if (args.geometry is None) == (args.model_path is None):
        raise OptionError(
            "give --geometry NAME (random weights) or --model-path, one of them: geometries are "
            + ", ".join(list_geometries())
        )
    if args.geometry is not None:
        get_geometry(args.geometry)
    elif args.tower_dtype:
        raise OptionError("--tower-dtype goes with --geometry: a checkpoint's tower is as loaded")


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    """Raises OptionError for unknown ones, UnsupportedVersionError on releases without them."""
    if args.host is None:
        return subject.HOSTS[:1]
    if args.model_path is not None:
        raise OptionError(f"--host {args.host} goes with --geometry: a checkpoint's form decides")
    hosts = tuple(args.host.split(","))
    if len(set(hosts)) < len(hosts) or not set(hosts) <= set(subject.HOSTS):
        raise OptionError(f"--host {args.host}: give one or both of {','.join(subject.HOSTS)}")
    if "transformers" in hosts:
        check_release()
    return hosts


def _check_tower(settings: BenchSettings) -> None:
    """Raise OptionError for a tower in another dtype than transformers' classes run it in."""
    asked = settings.tower_dtype
    if "transformers" in settings.hosts and asked not in (None, settings.dtype):
        raise OptionError(
            f"--tower-dtype {str(asked).removeprefix('torch.')}: --host transformers has the tower "
            f"in {str(settings.dtype).removeprefix('torch.')}, as all of the model: leave it out, "
            "or give that as --dtype"
        )


def _variants(args: argparse.Namespace) -> tuple[Variant, ...]:
    """What is compared; the first is LLaVA's own code alone, whose packing is the checkpoint's."""
    tuned = tuned_of(args)
    names = args.methods or (METHODS if tuned is None else NONE)
    given = variants(names.split(","), budgets(args, BUDGETS), args.prune_opt or ())
    chosen = with_tuned(given, tuned)
    alone = unpruned({"tiling": chosen[0].runtime.tiling})
    return (Variant(alone), *chosen[1:])


def _size(text: str) -> tuple[int, int]:
    """(width, height); raises OptionError."""
    try:
        width, height = (whole(part) for part in text.lower().split("x"))
    except ValueError:
        raise OptionError(f"--image-size {text}: give WIDTHxHEIGHT, as 672x672") from None
    return width, height


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
        return fit.run(fit.parse(args, _variants(args)))
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
