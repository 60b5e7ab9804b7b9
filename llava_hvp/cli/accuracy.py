"""`llava-hvp accuracy`: what pruning does to the answers of the shipped checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_hvp.accuracy.exam import TEMPLATE, Marks, examine
from llava_hvp.accuracy.store import Answers, digest, keeping
from llava_hvp.accuracy.tables import plot, render, scores_of
from llava_hvp.bench.machine import about
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.checkpoints.variants import Variant, variants
from llava_hvp.cli.arguments import (
    add_budgets,
    at_least,
    budgets,
    check_folder,
    device_of,
    progress,
    write_results,
)
from llava_hvp.cli.evaluate import INTERRUPTED
from llava_hvp.cli.extras import can_plot, need
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.files import read_json
from llava_hvp.methods import list_methods
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.exams import EXAMS, exam, exam_for
from llava_hvp.shapes.questions import Question
from llava_hvp.shapes.scenes import Scene
from llava_hvp.shapes.weights import SHIPPED, TOWER
from llava_hvp.tables import MARKDOWN, TERMINAL


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "accuracy",
        help="measure what pruning does to answers, on a trained LLaVA that is shipped",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=list_checkpoints(), default="llava-shapes")
    parser.add_argument("--model-path", type=Path, help="instead: one that you have trained")
    parser.add_argument(
        "--methods",
        default=",".join(list_methods()),
        help="separated by commas, all by default; unpruned is always measured",
    )
    parser.add_argument(
        "--pictures",
        choices=EXAMS,
        help="plain: of one tile; detail: larger, with things that vanish when shrunk to one; by "
        "default what the model is for",
    )
    add_budgets(parser, "0.75,0.5,0.4,0.25,0.11")
    parser.add_argument("--prune-opt", action="append", metavar="KEY=VALUE")
    parser.add_argument("--questions", type=int, default=2000, help="held-out, 2000 by default")
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


def main(found: argparse.Namespace) -> int:
    """Ask, mark, print; the exit code."""
    for name in ("questions", "batch"):
        at_least(found, name, 1)
    if found.model_path is not None and not found.model_path.is_dir():
        raise OptionError(f"--model-path {found.model_path}: no such folder")
    check_folder(found.out)
    need("host", "PIL", "sentencepiece", "accelerate")
    plots = found.out is not None and can_plot()
    device = device_of(found.device)
    chosen = variants(found.methods.split(","), budgets(found), found.prune_opt or ())
    name = found.model if found.model_path is None else model_name(str(found.model_path))
    pictures = found.pictures or exam_for(name)
    asked = list(exam(pictures, found.questions))
    facts = about(
        torch.device(device),
        f"{name}, float32, {len(asked)} held-out questions on {pictures} pictures, up to "
        f"{found.batch} at a time.",
    )
    facts["template"] = TEMPLATE
    base = None
    with contextlib.ExitStack() as stack:
        answers = Answers()
        if found.out:
            base = found.out / (name if found.pictures is None else f"{name}-{pictures}")
            settings = _settings(found, facts, chosen)
            unfinished = base.with_name(f"{base.name}.unfinished")
            answers = stack.enter_context(keeping(unfinished, settings, restart=found.restart))
        if len(answers):
            say(f"{len(answers)} answers are there; {answers.folder}")
        try:
            marks = _ask(found, name, asked, chosen, device, answers)
        except KeyboardInterrupt:
            say(
                "stopped; the same command goes on from the answers that are there"
                if found.out
                else "stopped; with --out FOLDER it could have gone on from here"
            )
            return INTERRUPTED
        scores = scores_of(marks)
        print(render(facts, scores, TERMINAL))
        if base is not None:
            title = f"{facts['model']} {facts['machine']}"
            write_results(
                base,
                {**facts, "rows": [asdict(score) for score in scores]},
                render(facts, scores, MARKDOWN),
                partial(plot, title, scores) if plots and len(scores) > 1 else None,
            )
            answers.throw_away()
    return 0


def _settings(
    found: argparse.Namespace, facts: dict[str, str], chosen: Sequence[Variant]
) -> dict[str, Any]:
    """Everything that answers and their times depend on."""
    if found.model_path is None:
        weights = digest(SHIPPED / found.model, SHIPPED / TOWER)
    else:
        weights = digest(found.model_path, *_tower_of(found.model_path))
    return {
        **{key: value for key, value in facts.items() if key != "command"},
        "weights": weights,
        "variants": [str(variant) for variant in chosen],
    }


def _tower_of(checkpoint: Path) -> list[Path]:
    """The folder of the vision tower that a checkpoint names, where it is one."""
    config = read_json(checkpoint / "config.json")
    tower = Path(str(config.get("mm_vision_tower")))
    return [tower] if tower.is_dir() else []


def _ask(
    found: argparse.Namespace,
    name: str,
    asked: Sequence[tuple[Scene, Question]],
    chosen: Sequence[Variant],
    device: str,
    answers: Answers,
) -> list[Marks]:
    # LLaVA comes only now: whatever was typed wrong has been said.
    from llava_hvp.checkpoints.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        path = found.model_path or checkpoint(folder, name)
        opened = open_checkpoint(
            str(path.resolve()), device, dtype=torch.float32, conv_mode=TEMPLATE
        )
        with progress(len(asked) * len(chosen), name, "answer") as bar:
            return examine(opened, asked, chosen, batch=found.batch, tick=bar.more, answers=answers)
