"""`llava-hvp accuracy`: what pruning does to the answers of the shipped checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.accuracy.store import Answers, keeping
from llava_hvp.checkpoints.before_loading import check_before_loading, check_language
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.checkpoints.variants import Variant, variants, with_tuned
from llava_hvp.cli.arguments import (
    add_budgets,
    add_tuned,
    at_least,
    budgets,
    check_folder,
    device_of,
    progress,
    tuned_of,
    weights_of,
    write_results,
)
from llava_hvp.cli.evaluate import INTERRUPTED
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.files import write_whole
from llava_hvp.lazy import torch
from llava_hvp.methods import NONE, list_methods
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.exams import EXAMS, exam, exam_for
from llava_hvp.shapes.questions import Question
from llava_hvp.shapes.scenes import Scene
from llava_hvp.shapes.weights import SHIPPED
from llava_hvp.tables import MARKDOWN, TERMINAL

if TYPE_CHECKING:
    from llava_hvp.accuracy.exam import Marks
    from llava_hvp.checkpoints.checkpoint import Checkpoint

BUDGETS = "0.75,0.5,0.4,0.25,0.11"  # of r_max
QUESTIONS = 2000
# Of --quick: what a first look needs.
QUICK_METHODS, QUICK_BUDGETS, QUICK_QUESTIONS = "hivtp,hiprune,random", "0.5,0.25", 100
# Seconds of an answer on one CPU core, choices looked at included, as `docs/measured.md` has them.
AN_ANSWER = 0.03
TOY = (
    "This checkpoint is small and was trained here: it tells whether a method finds what a "
    "question needs, and not what LLaVA-7B loses. Layers that methods read by default are those of "
    "CLIP-L/336 scaled to its twelve, which look at other things: HiPrune's registers are "
    "background here, so that it falls below random."
)

EXAMPLES = (
    "llava-hvp accuracy --quick --out results/accuracy",
    "llava-hvp accuracy --methods hivtp,fastv,hivtp+fastv --r-max 0.4 --questions 20",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "accuracy",
        "measure what pruning does to answers, on a trained LLaVA that is shipped",
        "All methods at five budgets take an hour on a CPU core; --quick takes half a "
        "minute. With --out a run that was stopped goes on with the same command.",
        EXAMPLES,
    )
    parser.add_argument("--model", choices=list_checkpoints(), default="llava-shapes")
    parser.add_argument("--model-path", type=Path, help="instead: one that you have trained")
    parser.add_argument(
        "--model-base", type=Path, help="and what of, where that holds a projector or adapters only"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a first look: {QUICK_QUESTIONS} questions, {QUICK_METHODS} at {QUICK_BUDGETS}, "
        "where other flags do not say otherwise; what a choice costs is not measured",
    )
    parser.add_argument(
        "--methods",
        help="separated by commas, all by default; unpruned is always measured",
    )
    parser.add_argument(
        "--pictures",
        choices=EXAMS,
        help="plain: of one tile; detail: larger, with things that vanish when shrunk to one; by "
        "default what the model is for",
    )
    add_tuned(parser)
    add_budgets(parser, BUDGETS)
    parser.add_argument("--prune-opt", action="append", metavar="KEY=VALUE")
    parser.add_argument(
        "--questions", type=int, metavar="N", help=f"held-out, {QUESTIONS} by default"
    )
    parser.add_argument("--batch", type=int, default=16, help="questions at a time, 16 by default")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for JSON, Markdown and a plot; interrupted, the same command goes on there",
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw away the answers of an interrupted run"
    )
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class AccuracySettings:
    """What `llava-hvp accuracy` asks of whom.

    Parameters
    ----------
    model : str
        a shipped checkpoint's name, or what `model_path` is called
    model_path : Path | None
        folder of one that was trained; None for the shipped one
    model_base : Path | None
        folder of what it was trained from, where it holds what was trained only
    variants : tuple[Variant, ...]
        what is compared; the first is unpruned
    pictures : str
        the exam, of EXAMS
    questions : int
        how many of it
    batch : int
        questions at a time, at most
    results : Path | None
        what the files of the results begin with; None to write none
    restart : bool
        throw away the answers of an interrupted run
    plots : bool
        whether a plot can be drawn
    looks : bool
        whether it is measured what choices cost, and what half precision leaves of them
    """

    model: str
    model_path: Path | None
    model_base: Path | None
    variants: tuple[Variant, ...]
    pictures: str
    questions: int
    batch: int
    device: str
    results: Path | None
    restart: bool
    plots: bool
    looks: bool


def parse(args: argparse.Namespace) -> AccuracySettings:
    """The settings; raises OptionError for what is wrong, with nothing loaded."""
    if args.questions is not None:
        at_least(args, "questions", 1)
    at_least(args, "batch", 1)
    for flag, folder in {"path": args.model_path, "base": args.model_base}.items():
        if folder is not None and not folder.is_dir():
            raise OptionError(f"--model-{flag} {folder}: no such folder")
    if args.model_base is not None and args.model_path is None:
        raise OptionError(f"--model-base {args.model_base} without --model-path: give both")
    check_folder(args.out)
    need("host", "PIL", "sentencepiece", "accelerate")
    plots = args.out is not None and can_plot()
    model = args.model if args.model_path is None else model_name(str(args.model_path))
    file = model if args.pictures is None else f"{model}-{args.pictures}"
    return AccuracySettings(
        model=model,
        model_path=args.model_path,
        model_base=args.model_base,
        device=device_of(args.device),
        variants=_variants(args),
        pictures=args.pictures or exam_for(model),
        questions=args.questions or (QUICK_QUESTIONS if args.quick else QUESTIONS),
        batch=args.batch,
        results=args.out / file if args.out else None,
        restart=args.restart,
        plots=plots,
        looks=not args.quick,
    )


def _variants(args: argparse.Namespace) -> tuple[Variant, ...]:
    """What is compared; of all methods by default, those budgets that can be had."""
    given = budgets(args, QUICK_BUDGETS if args.quick else BUDGETS)
    options = args.prune_opt or ()
    methods = args.methods or (QUICK_METHODS if args.quick else None)
    folder = args.model_path or SHIPPED / args.model
    tuned = tuned_of(args)
    if methods is not None or tuned is not None:
        chosen = with_tuned(variants((methods or NONE).split(","), given, options), tuned)
        check_before_loading(str(folder.resolve()), [variant.pruning for variant in chosen])
        return tuple(chosen)
    found, refused = [], []
    for variant in variants(list_methods(), given, options):
        try:
            check_language(str(folder.resolve()), variant.pruning)
        except LlavaHvpError as error:
            refused.append(f"{variant} is left out: {error}")
        else:
            found.append(variant)
    for line in refused:
        say(line)
    return tuple(found)


def run(settings: AccuracySettings) -> int:
    """Ask, mark, print; the exit code."""
    from llava_hvp.accuracy.choice import spread
    from llava_hvp.accuracy.exam import TEMPLATE
    from llava_hvp.accuracy.ranking import is_ranked, render_ranking
    from llava_hvp.accuracy.scores import scores_of
    from llava_hvp.accuracy.tables import plot, render, title_of
    from llava_hvp.bench.machine import about

    asked = list(exam(settings.pictures, settings.questions))
    facts = about(
        torch.device(settings.device),
        f"{settings.model}, float32, {len(asked)} held-out questions on {settings.pictures} "
        f"pictures, up to {settings.batch} at a time.",
    )
    facts["template"] = TEMPLATE
    if settings.model_path is None:
        facts["note"] = TOY
    base = settings.results
    with contextlib.ExitStack() as stack:
        answers = Answers()
        if base is not None:
            unfinished = base.with_name(f"{base.name}.unfinished")
            depends = _depends(settings, facts)
            answers = stack.enter_context(keeping(unfinished, depends, restart=settings.restart))
        if len(answers):
            say(f"{len(answers)} answers are there; {answers.folder}")
        say(_announced(settings, len(asked), len(answers)))
        try:
            scores = scores_of(_measure(settings, asked, answers), answers)
        except KeyboardInterrupt:
            say(
                "stopped; with --out FOLDER it could have gone on from here"
                if base is None
                else "stopped; the same command goes on from the answers that are there"
            )
            return INTERRUPTED
        facts["looked_at"] = str(len(spread(asked)))
        print(render(facts, scores, TERMINAL))
        if base is not None:
            write_results(
                base,
                {**facts, "rows": [asdict(score) for score in scores]},
                render(facts, scores, MARKDOWN),
                partial(plot, title_of(facts), scores)
                if settings.plots and len(scores) > 1
                else None,
            )
            if is_ranked(scores):
                page = base.with_name(f"{base.name}-ranking.md")
                write_whole(page, render_ranking(facts, scores).encode())
                say(f"wrote {page}")
            answers.throw_away()
    return 0


def _announced(settings: AccuracySettings, questions: int, there: int) -> str:
    """What is to be done and how long it takes, before it begins."""
    wanted = questions * len(settings.variants) - there
    seconds = AN_ANSWER * wanted
    long = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(5, seconds):.0f} seconds"
    goes_on = "go on with the same command" if settings.results else "keep them by --out FOLDER"
    ways = len(settings.variants) - 1
    return (
        f"{questions} questions, each asked unpruned and in {ways} ways pruned: "
        f"about {long} on one CPU core; Ctrl-C stops, {goes_on}"
    )


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _depends(settings: AccuracySettings, facts: dict[str, str]) -> dict[str, Any]:
    """Everything that answers and their times depend on."""
    return {
        **{key: value for key, value in facts.items() if key != "command"},
        "weights": weights_of(settings.model, settings.model_path, settings.model_base),
        "variants": [str(variant) for variant in settings.variants],
        **{
            f"{variant.name}: {name}": value
            for variant in settings.variants
            if variant.pruning is not None
            for name, value in variant.pruning.source.items()
        },
    }


def _measure(
    settings: AccuracySettings, asked: Sequence[tuple[Scene, Question]], answers: Answers
) -> list[Marks]:
    """The marks; what was chosen lies in `answers`."""
    # LLaVA comes only now: whatever was typed wrong has been said.
    from llava_hvp.accuracy.choice import Opened, is_looked_at, look, spread
    from llava_hvp.accuracy.exam import TEMPLATE, examine, sheets
    from llava_hvp.checkpoints.opening import open_checkpoint

    chosen = settings.variants
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        path = (settings.model_path or checkpoint(folder, settings.model)).resolve()
        base = None if settings.model_base is None else str(settings.model_base.resolve())

        def opened_in(dtype: torch.dtype) -> Checkpoint:
            return open_checkpoint(
                str(path), settings.device, base=base, dtype=dtype, conv_mode=TEMPLATE
            )

        opened = opened_in(torch.float32)
        with progress(len(asked) * len(chosen), settings.model, "answer") as bar:
            marks = examine(
                opened, asked, chosen, batch=settings.batch, tick=bar.more, answers=answers
            )
        if not settings.looks:
            return marks
        looked_at = list(sheets(opened, spread(asked), settings.batch))
        looks = len(looked_at) * sum(map(is_looked_at, chosen))
        with progress(looks, settings.model, "choice") as bar:
            look(
                lambda sheet: Opened.of(opened, sheet, opened_in),
                looked_at,
                chosen,
                answers,
                tick=bar.more,
            )
    return marks
