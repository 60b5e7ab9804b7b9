"""`llava-hvp reproduce NAME`: every command of a published table, and the table at the end."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.naming import model_name, named_path
from llava_hvp.cli.evaluate import add_arguments, completed, gpus_of
from llava_hvp.cli.parser import add_command
from llava_hvp.cli.table import add_as_released
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.plan import Step, check, check_checkpoint, environment, is_done, plan
from llava_hvp.evaluation.published import TABLES, Table, get_table
from llava_hvp.evaluation.rendering import comparison

EXAMPLES = ("llava-hvp reproduce hivtp-1 --model-path liuhaotian/llava-v1.5-7b --dry-run",)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "reproduce",
        "run a whole table of a paper",
        "Each benchmark runs through the harness that its published figure came from: "
        "look at --dry-run first. Arguments that are not listed "
        "go to LLaVA's own eval scripts.",
        EXAMPLES,
    )
    parser.add_argument("table", help=f"one of {', '.join(TABLES)}")
    add_arguments(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: run without CUDA, slowly")
    parser.add_argument("--only", metavar="NAME,NAME", default="", help="of these benchmarks")
    add_as_released(parser)
    parser.add_argument("--prior", action="store_true", help="also the rows of prior methods")
    parser.add_argument("--dry-run", action="store_true", help="list the commands and their data")
    parser.set_defaults(main=main, passes=True)


@dataclass(frozen=True)
class ReproduceSettings:
    """What `llava-hvp reproduce` runs.

    Parameters
    ----------
    paper : Table
        the published table
    as_released : bool
        prune as the paper's released code does
    device : str | None
        "cpu" for no CUDA
    only : tuple[str, ...]
        these benchmarks; all where it is empty
    prior : bool
        also the rows of prior methods
    stock : tuple[str, ...]
        further arguments for LLaVA's own eval scripts
    dry_run : bool
        list the commands only
    """

    paper: Table
    as_released: bool
    model_path: str
    data: Path
    out: Path
    gpus: tuple[str, ...]
    device: str | None
    only: tuple[str, ...]
    prior: bool
    stock: tuple[str, ...]
    dry_run: bool


def parse(args: argparse.Namespace) -> ReproduceSettings:
    """The settings; raises OptionError."""
    request = Request(device=args.device)
    paper, model_path = get_table(args.table), named_path(args.model_path)
    if args.dry_run:  # of a table that may run elsewhere
        gpus = tuple((args.gpus or "0").split(","))
    else:
        request = completed(request)
        if request.pruning is not None:
            raise OptionError("LLAVA_HVP names a method, but the table does: unset it")
        gpus = gpus_of(args.gpus, request)
    return ReproduceSettings(
        paper=paper,
        as_released=args.as_released,
        model_path=model_path,
        data=args.data,
        out=args.out,
        gpus=gpus,
        device=request.device,
        only=tuple(name for name in args.only.split(",") if name),
        prior=args.prior,
        stock=(*args.unknown, *args.rest),
        dry_run=args.dry_run,
    )


def run(settings: ReproduceSettings) -> int:
    """Run the table, or list what would run; the exit code."""
    paper = settings.paper
    table = paper.released(beside=False) if settings.as_released else paper
    steps = plan(
        table,
        model_path=settings.model_path,
        data=settings.data,
        out=settings.out,
        gpus=settings.gpus,
        device=settings.device,
        only=settings.only,
        prior=settings.prior,
        stock=settings.stock,
    )
    if settings.dry_run:
        _list(steps)
        return 0
    check(steps)
    for number, step in enumerate(steps, 1):
        say(f"{number}/{len(steps)}: {table.name}, {step.row.label}, {step.column.label}")
        _run(step, settings)
    results = read_results(settings.out, model_name(settings.model_path))
    shown = paper.released(beside=True) if settings.as_released else paper
    print(comparison(compare(shown, results), "terminal"))
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _list(steps: list[Step]) -> None:
    for step in steps:
        print(f"# {step.row.label}, {step.column.label} ({step.column.harness})")
        print(f"#   data: {step.data}; about {step.images} images")
        if step.missing:
            print(f"#   MISSING: {step.missing}")
        print(step)
    images = sum(step.images for step in steps)
    missing = sum(bool(step.missing) for step in steps)
    print(f"# {len(steps)} commands, about {images} images; {missing} commands lack something")


def _run(step: Step, settings: ReproduceSettings) -> None:
    check_checkpoint(step, settings.out, settings.model_path)
    if is_done(step, settings.out, settings.model_path):
        say("the result is there")
        return
    code = subprocess.run(step.command, env=environment(step), check=False).returncode
    if code:
        raise EvaluationError(f"exit code {code} of: {step}. The same command goes on from here")
    # lmms-eval ends with 0 after errors too.
    is_lmms = step.column.task is not None
    if is_lmms and not is_done(step, settings.out, settings.model_path):
        raise EvaluationError(f"no result of: {step}")
