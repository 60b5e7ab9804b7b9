"""`llava-hvp eval BENCHMARK`: answers, score and one results file; eval_scripts/ call it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_hvp import config
from llava_hvp.checkpoints.naming import named_path
from llava_hvp.cli.interpreter import hook_in
from llava_hvp.cli.parser import add_command
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.benchmarks import BENCHMARKS, get_benchmark
from llava_hvp.evaluation.data import DEFAULT_DATA
from llava_hvp.evaluation.job import Job
from llava_hvp.evaluation.rendering import one_line
from llava_hvp.evaluation.run import evaluate

INTERRUPTED = 130

EXAMPLES = (
    "llava-hvp eval pope --model-path shapes/llava-shapes --device cpu --prune-method "
    "hivtp --r-max 0.5",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "eval",
        "run a benchmark over LLaVA's own eval scripts and scorers",
        "Data lies where LLaVA's Evaluation.md puts it. Killed, the same command goes "
        "on. Arguments that are not listed go to LLaVA's own eval script.",
        EXAMPLES,
    )
    parser.add_argument("benchmark", help=f"one of {', '.join(BENCHMARKS)}")
    add_arguments(parser)
    config.add_flags(parser, device=True)
    ocr = parser.add_mutually_exclusive_group()
    ocr.add_argument("--ocr", action="store_true", default=None, help="TextVQA: with OCR tokens")
    ocr.add_argument("--no-ocr", action="store_false", dest="ocr", help="TextVQA: without them")
    parser.add_argument(
        "--restart", action="store_true", help="throw away the answers of an earlier run"
    )
    parser.set_defaults(main=main, passes=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark and a whole table have in common."""
    parser.add_argument("--model-path", required=True, help="checkpoint, as LLaVA's commands take")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_DATA, help=f"folder of the data, {DEFAULT_DATA}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of the results, results"
    )
    parser.add_argument(
        "--gpus", metavar="0,1,2", help="a process on each; CUDA_VISIBLE_DEVICES by default, else 0"
    )


def parse(args: argparse.Namespace) -> Job:
    """The run that is asked for; raises OptionError."""
    benchmark = get_benchmark(args.benchmark)
    request = requested(args)
    job = Job(
        benchmark,
        named_path(args.model_path),
        request,
        args.data,
        args.out,
        gpus_of(args.gpus, request),
        args.ocr,
        args.restart,
        (*args.unknown, *args.rest),
    )
    hooked = hook_in((sys.executable,))
    if hooked is None or not hooked[0]:
        raise OptionError(f"{sys.executable} runs no startup hook of ours: see `llava-hvp doctor`")
    return job


def run(job: Job) -> int:
    """Run it and print its number; the exit code."""
    try:
        result = evaluate(job)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the answers that are there")
        return INTERRUPTED
    print(one_line(result))
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def requested(args: argparse.Namespace) -> Request:
    """The flags before the environment; raises OptionError for what cannot be done here."""
    return completed(config.requested(args))


def completed(flags: Request) -> Request:
    """What flags ask for, with the environment's word on all that they leave open.

    Raises OptionError for what cannot be done here.
    """
    around = config.from_environment(os.environ)
    if config.switched_off(os.environ):
        raise OptionError(f"{config.DISABLE_VARIABLE} is set, nothing could be measured: unset it")
    if flags.train or around.train:
        raise OptionError("--prune-train belongs to llava.train.train: leave it out")
    device = flags.device or around.device
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise OptionError("no CUDA on this machine: give --device cpu (slow)")
    # `none` is how answers are named that no method was given for, so both are one thing here.
    return replace(
        flags if flags.asked else around, device=device, unpruned=False, reports=None, part=None
    )


def gpus_of(text: str | None, request: Request) -> tuple[str, ...]:
    """Names of GPUs; raises OptionError for one that is not there."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if text is None:
        on_cpu = request.device == "cpu"
        return ("0",) if on_cpu or not outer.strip() else tuple(outer.replace(" ", "").split(","))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise OptionError(f"--gpus {text!r}: give different GPUs, as 0,1,2,3")
    if request.device != "cpu" and not outer:
        import torch

        count = torch.cuda.device_count()
        wrong = [name for name in names if name.isdigit() and int(name) >= count]
        if wrong:
            raise OptionError(
                f"--gpus {text}: no GPU {wrong[0]}, this machine has 0 to {count - 1}"
            )
    return names
