"""`llava-hvp reproduce NAME`: every command of a published table, and the table at the end."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

from llava_hvp.checkpoints.naming import model_name, named_path
from llava_hvp.cli.evaluate import add_arguments, gpus_of, requested
from llava_hvp.cli.table import add_as_released
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import EvaluationError, OptionError
from llava_hvp.evaluation.compare import compare
from llava_hvp.evaluation.measured import read_results
from llava_hvp.evaluation.plan import Step, check, check_checkpoint, environment, is_done, plan
from llava_hvp.evaluation.published import TABLES, get_table
from llava_hvp.evaluation.rendering import comparison


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "reproduce",
        help="run a whole table of a paper",
        description="Each benchmark runs through the harness that its published figure came from. "
        "Arguments that are not listed go to LLaVA's own eval scripts.",
        allow_abbrev=False,
    )
    parser.add_argument("table", help=f"one of {', '.join(TABLES)}")
    add_arguments(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: run without CUDA, slowly")
    parser.add_argument("--only", metavar="NAME,NAME", default="", help="of these benchmarks")
    add_as_released(parser)
    parser.add_argument("--dry-run", action="store_true", help="list the commands and their data")
    parser.set_defaults(main=main, passes=True)


def main(found: argparse.Namespace) -> int:
    """Run the table, or list what would run; the exit code."""
    paper = get_table(found.table)
    table = paper.released(beside=False) if found.as_released else paper
    found.model_path = named_path(found.model_path)
    request = Request(device=found.device)
    if not found.dry_run:
        found.prune_method = found.r_max = found.num_tokens = found.prune_opt = None
        found.prune_train = False
        request = requested(found)
        if request.method is not None:
            raise OptionError("LLAVA_HVP names a method, but the table does: unset it")
    steps = plan(
        table,
        model_path=found.model_path,
        data=found.data,
        out=found.out,
        gpus=_gpus(found, request),
        device=request.device,
        only=[name for name in found.only.split(",") if name],
        stock=(*found.unknown, *found.rest),
    )
    if found.dry_run:
        _list(steps)
        return 0
    check(steps)
    for number, step in enumerate(steps, 1):
        say(f"{number}/{len(steps)}: {table.name}, {step.row.label}, {step.column.label}")
        _run(step, found)
    results = read_results(found.out, model_name(found.model_path))
    shown = paper.released(beside=True) if found.as_released else paper
    print(comparison(compare(shown, results), "terminal"))
    return 0


def _gpus(found: argparse.Namespace, request: Request) -> tuple[str, ...]:
    if found.dry_run:  # of a table that may run elsewhere
        return tuple((found.gpus or "0").split(","))
    return gpus_of(found.gpus, request)


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


def _run(step: Step, found: argparse.Namespace) -> None:
    check_checkpoint(step, found.out, found.model_path)
    if is_done(step, found.out, found.model_path):
        say("the result is there")
        return
    code = subprocess.run(step.command, env=environment(step), check=False).returncode
    if code:
        raise EvaluationError(f"exit code {code} of: {step}. The same command goes on from here")
    # lmms-eval ends with 0 after errors too.
    is_lmms = step.column.task is not None
    if is_lmms and not is_done(step, found.out, found.model_path):
        raise EvaluationError(f"no result of: {step}")
