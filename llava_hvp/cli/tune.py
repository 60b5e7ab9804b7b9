"""`llava-hvp tune`: which options, or how few tokens, on your own pictures and without labels."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.naming import model_name, named_path
from llava_hvp.checkpoints.variants import name_of, variants
from llava_hvp.cli.arguments import (
    add_budgets,
    add_loading,
    at_least,
    bits_of,
    budgets,
    device_of,
    exclude,
    progress,
    weights_of,
)
from llava_hvp.cli.evaluate import INTERRUPTED
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.lazy import torch
from llava_hvp.methods import NONE, list_methods, method_spec
from llava_hvp.options import read_option
from llava_hvp.runtime import BUDGET, INSIDE, JOINED, method_classes, options_of
from llava_hvp.shapes import list_checkpoints
from llava_hvp.shapes.exams import exam_for
from llava_hvp.tune.questions import Asked, drawn, in_folder
from llava_hvp.tune.settings import TuneSettings
from llava_hvp.tuned import load_method

if TYPE_CHECKING:
    from llava_hvp.tune.store import Measured

BUDGETS = "0.25"  # of r_max
ENDING = ".json"
METHODS = "hivtp,hiprune"
EXAMPLES = (
    "llava-hvp tune --model-path shapes/llava-shapes --images shapes/llava-shapes/pictures "
    "--questions shapes/llava-shapes/questions.jsonl --methods hivtp --count 16",
)
EXPLAINED = (
    "Divergence of the pruned model's answers from the unpruned one's own, in nats an answer, with "
    "95 % intervals over pictures: {choosing} questions chose, {judging} on other pictures judged."
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "tune",
        "find options, or the smallest budget, on your own pictures and without labels",
        "The unpruned model is the label: what moves its answers least is best. Half of the "
        "pictures choose, the other half judge. How long it takes is said beforehand.",
        EXAMPLES,
    )
    what = parser.add_argument_group("which model")
    what.add_argument("--model-path", help="a LLaVA checkpoint")
    what.add_argument("--model", choices=list_checkpoints(), help="instead: one that is shipped")
    add_loading(what)
    asked = parser.add_argument_group("what it is asked")
    asked.add_argument("--images", type=Path, metavar="FOLDER", help="your pictures")
    asked.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="LLaVA's question file (JSON lines with image and text); without, general questions",
    )
    asked.add_argument("--count", type=int, default=256, help="questions at most, 256 by default")
    asked.add_argument("--new-tokens", type=int, default=32, help="of an answer, 32 by default")
    asked.add_argument("--batch", type=int, default=16, help="questions at a time, 16 by default")
    asked.add_argument("--seed", type=int, default=0, help="of the draw of the halves")
    how = parser.add_argument_group("what is tried")
    how.add_argument(
        "--methods",
        metavar="NAME,NAME",
        help=f"of {', '.join(list_methods())}; two as one by +; {METHODS} by default",
    )
    add_budgets(how, BUDGETS)
    how.add_argument(
        "--prune-opt",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the methods that have it, which is left as it is, repeatable",
    )
    how.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="instead of options: the smallest budget at which this share of answers stays the "
        "same, as 0.98",
    )
    how.add_argument(
        "--prune-from", metavar="FILE", help="with --agreement: the options of an earlier tune"
    )
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        default=Path("tuned.json"),
        help="tuned.json by default; a table and a plot go beside it, and an interrupted run goes "
        "on there",
    )
    where.add_argument("--restart", action="store_true", help="throw away an interrupted run")
    parser.set_defaults(main=main)


def parse(args: argparse.Namespace) -> TuneSettings:
    """The settings; raises OptionError for what is wrong, with nothing loaded."""
    if (args.model is None) == (args.model_path is None):
        raise OptionError(
            "give --model-path, or --model with one that is shipped: "
            + ", ".join(list_checkpoints())
        )
    for name, least in (("count", 2), ("new_tokens", 1), ("batch", 1)):
        at_least(args, name, least)
    bits = bits_of(args)
    need("host", "PIL", "sentencepiece", "accelerate")
    if args.out.suffix != ENDING or args.out.is_dir() or not args.out.parent.is_dir():
        raise OptionError(f"--out {args.out}: give a file in a folder that is there, as tuned.json")
    names, options = _tried(args)
    given = budgets(args, BUDGETS)
    chosen = variants(names, given, options)
    if len(chosen) == 1:
        raise OptionError(f"--methods {args.methods}: {NONE} has nothing to tune: name a method")
    from llava_hvp.accuracy.exam import TEMPLATE

    path = None if args.model_path is None else named_path(args.model_path)
    if path is not None:
        check_before_loading(path, [variant.pruning for variant in chosen])
    return TuneSettings(
        model=args.model or model_name(args.model_path),
        model_path=path,
        model_base=args.model_base,
        conv_mode=args.conv_mode or (TEMPLATE if args.model else None),
        bits=bits,
        device=device_of(args.device),
        asked=tuple(_asked(args)),
        new_tokens=args.new_tokens,
        batch=args.batch,
        seed=args.seed,
        methods=tuple(dict.fromkeys(v.pruning.spec for v in chosen[1:] if v.pruning is not None)),
        budgets=tuple(given),
        fixed=_fixed(names, options),
        agreement=args.agreement,
        unpruned=chosen[0],
        out=args.out,
        restart=args.restart,
        plots=can_plot(),
    )


def _asked(args: argparse.Namespace) -> list[Asked]:
    if args.images is not None:
        return in_folder(args.images, args.questions, args.count, args.seed, args.out.stem)
    if args.questions is not None:
        raise OptionError("--questions without --images: give the folder of its pictures")
    if args.model is None:
        raise OptionError("--images is missing: give a folder of your pictures")
    return drawn(exam_for(args.model), args.count)


def _tried(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of methods, and the options that they are given; raises OptionError."""
    if args.agreement is None and args.prune_from is not None:
        raise OptionError("--prune-from goes with --agreement: its options are tuned already")
    if args.agreement is not None:
        if not 0 < args.agreement <= 1:
            raise OptionError(f"--agreement {args.agreement}: give a share in (0, 1], as 0.98")
        for name in ("r_max", "num_tokens"):
            exclude(args, "agreement", name)
    if args.prune_from is None:
        return (args.methods or METHODS).split(","), args.prune_opt or []
    for name in ("methods", "prune_opt"):
        exclude(args, "prune_from", name)
    tuned = load_method(args.prune_from)
    budgets = (*BUDGET, *(INSIDE + name for name in BUDGET))
    return [tuned.spec], [f"{n}={v}" for n, v in tuned.given.items() if n not in budgets]


def _fixed(names: list[str], options: list[str]) -> dict[str, dict[str, Any]]:
    """By method, the options that were given and that it has."""
    fixed = {}
    for name in (name for name in names if name_of(name) != NONE):
        read = dict(read_option(name, text) for text in options)
        kinds = method_classes(name)
        known = options_of(*kinds)
        fixed[JOINED.join(map(method_spec, kinds))] = {
            key: value for key, value in read.items() if key in known
        }
    return fixed


def run(settings: TuneSettings) -> int:
    """Search, judge, print and write; the exit code."""
    from llava_hvp.bench.machine import about
    from llava_hvp.tune.store import keeping

    facts = about(
        torch.device(settings.device),
        f"{settings.model}{f', {settings.bits} bit' if settings.bits else ''}.",
    )
    unfinished = settings.out.with_suffix(".unfinished")
    with keeping(unfinished, _depends(settings, facts), restart=settings.restart) as measured:
        if len(measured):
            say(f"{len(measured)} measurements are there; {unfinished}")
        try:
            _tune(settings, facts, measured)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from what is measured")
            return INTERRUPTED
        measured.throw_away()
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _depends(settings: TuneSettings, facts: dict[str, str]) -> dict[str, Any]:
    """Everything that measurements depend on."""
    return {
        **{name: facts[name] for name in ("versions", "model")},
        "device": settings.device,
        "weights": weights_of(settings.model, settings.model_path, settings.model_base),
        "conv_mode": settings.conv_mode,
        "unpruned": str(settings.unpruned),
        "asked": [[each.picture, each.text] for each in settings.asked],
        "new_tokens": settings.new_tokens,
        "batch": settings.batch,
        "seed": settings.seed,
        "fixed": {name: {k: str(v) for k, v in o.items()} for name, o in settings.fixed.items()},
    }


@contextlib.contextmanager
def _bar(total: int, half: str) -> Iterator[Callable[[int], None]]:
    with progress(total, half, "step") as bar:
        yield bar.more


def _tune(settings: TuneSettings, facts: dict[str, Any], measured: Measured) -> None:
    """Look for what was asked for, and write it."""
    from llava_hvp.cli.tune_files import Written
    from llava_hvp.encoder.digest import tower_digest
    from llava_hvp.tune.work import curves_of, field_of, options_found

    halves = settings.halves
    facts["explained"] = EXPLAINED.format(
        choosing=len(halves.choosing), judging=len(halves.judging)
    )
    with field_of(settings, measured, _bar) as field:
        tower = tower_digest(field.opened.vit)
        written = Written(settings.out, tower, facts, settings.plots)
        if settings.agreement is not None:
            written.curves(curves_of(settings, field))
        else:
            written.options(options_found(settings, field))
