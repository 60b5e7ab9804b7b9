"""`llava-hvp bench`: time, memory and FLOPs of pruned LLaVA beside unpruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_hvp.bench import subject
from llava_hvp.bench.clock import Clock
from llava_hvp.bench.machine import about
from llava_hvp.bench.measure import FEWEST, measure, turns
from llava_hvp.bench.phases import Bench
from llava_hvp.bench.results import Row, rows_of
from llava_hvp.bench.tables import render
from llava_hvp.bench.workload import make_workload, pattern
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.geometry import list_geometries
from llava_hvp.checkpoints.naming import named_path
from llava_hvp.checkpoints.variants import variants
from llava_hvp.cli.arguments import (
    add_budgets,
    at_least,
    bits_of,
    budgets,
    check_folder,
    device_of,
    exclude,
    listed,
    progress,
    whole,
    write_results,
)
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.errors import OptionError
from llava_hvp.methods import list_methods
from llava_hvp.tables import MARKDOWN, TERMINAL

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench", help="measure time, memory and FLOPs beside unpruned LLaVA", allow_abbrev=False
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--geometry",
        metavar="NAME",
        help=f"random weights in a published shape: {', '.join(list_geometries())}",
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
        "--dtype for NeXT",
    )
    how = parser.add_argument_group("how it is pruned")
    how.add_argument(
        "--methods",
        default="none,hivtp,hiprune,random",
        help=f"of none, {', '.join(list_methods())}; none is always measured",
    )
    add_budgets(how, "0.75,0.5,0.4,0.25")
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
    rounds.add_argument("--seed", type=int, default=0)
    rounds.add_argument("--out", type=Path, metavar="FOLDER", help="for JSON, Markdown and a plot")
    parser.set_defaults(main=main)


def main(found: argparse.Namespace) -> int:
    """Measure and print; the exit code."""
    _check(found)
    batches = listed(found.batch, whole, "--batch")
    chosen = variants(found.methods.split(","), budgets(found), found.prune_opt or ())
    if found.all_attentions:
        released = [replace(v, all_attentions=True) for v in chosen if v.pruning is not None]
        chosen += [v for v in released if v.name.split(",")[0] not in ("random", "uniform")]
    pictures = _pictures(found, max(batches))
    if found.model_path is not None:
        check_before_loading(found.model_path, [v.method for v in chosen])
    # LLaVA and the model come only now: whatever was typed wrong has been said.
    from llava_hvp.hosts.llava import compat

    compat.bridge()  # unpruned LLaVA runs on no newer transformers without
    what = _subject(found)
    device, rows = torch.device(found.device), []
    for batch in batches:
        work = make_workload(
            what.model,
            pictures[:batch],
            what.prompt,
            new_tokens=found.new_tokens,
            device=device,
            dtype=what.dtype,
        )
        bench = Bench(
            what.model,
            what.geometry.vision,
            work,
            Clock(device),
            tokenizer=what.tokenizer,
            clip_text=what.clip_text,
        )
        share = found.max_seconds / len(batches)
        total = turns(chosen, found.rounds, what.geometry.vision)
        with progress(total, f"batch {batch}", "turn") as bar:
            measured = measure(bench, chosen, found.rounds, tick=bar.named, most_seconds=share)
        rows += rows_of(measured, work, what.geometry)
    facts = about(
        device,
        f"{what.about}; {pictures[0].width} x {pictures[0].height} pixels, {work.text_tokens} text "
        f"tokens, {found.new_tokens} new ones; medians over {rows[0].rounds} rounds.",
    )
    print(render(facts, rows, TERMINAL))
    if found.out:
        bits = f"-{found.bits}bit" if found.bits else ""
        name = f"{what.name}{bits}-{device.type}"
        _write(found.out / name, facts, rows, plots=found.plots)
    return 0


def _check(found: argparse.Namespace) -> None:
    """Raise OptionError for what does not go together; fill in the device and the dtype."""
    if (found.geometry is None) == (found.model_path is None):
        raise OptionError(
            "give --geometry NAME (random weights) or --model-path, one of them: geometries are "
            + ", ".join(list_geometries())
        )
    if found.geometry is not None:
        subject.get_geometry(found.geometry)
    elif found.tower_dtype:
        raise OptionError("--tower-dtype goes with --geometry: a checkpoint's tower is as loaded")
    if found.model_path is not None:
        found.model_path = named_path(found.model_path)
    found.bits = bits_of(found)
    exclude(found, "image_file", "image_size")
    for name, least in (("rounds", FEWEST), ("new_tokens", 1), ("text_tokens", 2)):
        at_least(found, name, least)
    if not found.max_seconds > 0:
        raise OptionError(f"--max-seconds {found.max_seconds}: give a time above 0")
    check_folder(found.out)
    need("bench", "PIL", "sentencepiece", "google.protobuf")
    found.plots = found.out is not None and can_plot()
    found.device = device_of(found.device)
    half = found.bits is not None or torch.device(found.device).type == "cuda"
    found.dtype = DTYPES[found.dtype or ("float16" if half else "float32")]
    found.tower_dtype = DTYPES[found.tower_dtype] if found.tower_dtype else None


def _subject(found: argparse.Namespace) -> subject.Subject:
    if found.geometry is not None:
        return subject.of_geometry(
            found.geometry,
            found.device,
            found.dtype,
            tower_dtype=found.tower_dtype,
            bits=found.bits,
            text_tokens=found.text_tokens,
            seed=found.seed,
        )
    return subject.of_checkpoint(
        found.model_path,
        found.model_base,
        found.device,
        found.dtype,
        bits=found.bits,
        conv_mode=found.conv_mode,
        question=found.prompt,
    )


def _pictures(found: argparse.Namespace, count: int) -> list[Any]:
    if found.image_file:
        from PIL import Image

        try:
            return [Image.open(found.image_file).convert("RGB")] * count
        except OSError as error:
            raise OptionError(f"--image-file {found.image_file}: {error}") from error
    text = found.image_size or "640x480"
    try:
        width, height = (whole(part) for part in text.lower().split("x"))
    except ValueError:
        raise OptionError(f"--image-size {text}: give WIDTHxHEIGHT, as 672x672") from None
    return [pattern((width, height), found.seed + number) for number in range(count)]


def _write(base: Path, about: dict[str, str], rows: Sequence[Row], *, plots: bool) -> None:
    """The JSON file, the Markdown table and the plot, each whole or not at all."""
    from llava_hvp.bench.plot import plot

    title = f"{about['model']} {about['machine']}"
    write_results(
        base,
        {**about, "rows": [asdict(row) for row in rows]},
        render(about, rows, MARKDOWN),
        partial(plot, title, rows) if plots else None,
    )
