"""Whether `llava-hvp tune` finds what benchmarks and labels would have found.

    python eval_scripts/tune_accuracy.py --model llava-shapes --out docs/results/tune

On a shipped checkpoint, whose questions have known answers. The divergence of all candidates on
some questions, whose answers it does not look at; the accuracy of the same candidates on others;
then draws of 16, 64 and 256 of the first, each of which chooses the candidate with the least
divergence: how often its accuracy is within a point of the best candidate's, and how much above the
default's. Interrupted, the same command goes on; --minutes ends it after a whole number of blocks
of held-out questions.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_hvp.accuracy.exam import TEMPLATE
from llava_hvp.bench.machine import machine, versions
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.console import say
from llava_hvp.files import write_json, write_whole
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.exams import exam, exam_for
from llava_hvp.tables import MARKDOWN, text_table
from llava_hvp.tune.candidates import Space
from llava_hvp.tune.divergence import Answered, Moved
from llava_hvp.tune.questions import Asked, Sheet, sheets_of
from llava_hvp.tune.search import Field, model_of
from llava_hvp.tune.store import Measured, keeping

POOL, HELD = "unlabelled", "held out"
BLOCK = 250  # held-out questions that all candidates are asked before the next ones
DRAWS, SIZES = 10, (16, 64, 256)
FINER = 4  # candidates around the best of each space
BEST = 4  # candidates of least divergence whose accuracy is measured, chosen by a draw or not
WITHIN = 1.0  # points of the best


class Known(Answered):
    """As `Answered`, but what is right in place of what the unpruned model says.

    `same` of what it gives: whether the greedy answer is the right one, token by token.
    """

    def __init__(self, opened: Any, sheet: Sheet, right: dict[Asked, str]) -> None:
        self.right = right
        super().__init__(opened, sheet, Variant(), 0)

    def _said(self, new_tokens: int) -> tuple[Tensor, Tensor]:
        tokenizer = self.opened.tokenizer
        rows = []
        for asked in self.sheet.asked:
            ids = tokenizer(f"{self.right[asked]}", add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        answers = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return answers, torch.tensor([len(row) for row in rows])

    def _compared(self, reference: Tensor, found: Tensor, reports: Sequence[Any]) -> Moved:
        moved = super()._compared(reference, found, reports)
        counted = torch.arange(self.answers.shape[1]) < self.counts[:, None]
        right = ((found.argmax(-1) == self.answers) | ~counted).all(1)
        return Moved(moved.kl, right.tolist(), moved.kept, moved.kept_of_patches)


def measure_right(
    opened: Any,
    sheets: Sequence[Sheet],
    right: dict[Asked, str],
    candidates: Sequence[PruningConfig | None],
    measured: Measured,
    block: str,
) -> None:
    """Which held-out questions each candidate answers right; None is unpruned."""
    for number, sheet in enumerate(sheets):
        missing = [c for c in candidates if measured.find(block, number, c) is None]
        if not missing:
            continue
        known = Known(opened, sheet, right)
        if missing[0] is None:
            found = known._reference(False)
            measured.add(block, number, None, known._compared(found, found, []))
        pruned = [candidate for candidate in missing if candidate is not None]
        for candidate, moved in zip(pruned, known.moved_by(pruned), strict=True):
            measured.add(block, number, candidate, moved)
    say(f"{block}: {sum(len(sheet.asked) for sheet in sheets)} questions")


def accuracy(measured: Measured, blocks: Sequence[str], candidate: object) -> float:
    """Percent of the held-out questions of some blocks."""
    found = [s for block in blocks for m in measured.of(block, candidate) for s in m.same]
    return 100 * statistics.mean(found)


def measure_moved(field: Field, candidates: Sequence[PruningConfig]) -> None:
    """The divergence of each candidate on the unlabelled questions."""
    field.measure(POOL, candidates)
    say(f"{POOL}: {len(candidates)} candidates")


def candidates_of(field: Field, spaces: Sequence[Space]) -> dict[str, list[PruningConfig]]:
    """The first look of the search, and the first of what it would try next, by all questions."""
    tried = {str(space): space.first() for space in spaces}
    measure_moved(field, [each for found in tried.values() for each in found])
    for space in spaces:
        ranked = field.ranked(POOL, tried[str(space)])
        known = {str(each) for each in ranked}
        new = [each for each in space.near(ranked) if str(each) not in known]
        tried[str(space)] = [*ranked, *new[:FINER]]
    measure_moved(field, [each for found in tried.values() for each in found])
    return tried


@dataclass(frozen=True)
class Drawn:
    """What draws of unlabelled questions choose of a space.

    Parameters
    ----------
    kl : dict[str, list[float]]
        of each candidate the divergence on every unlabelled question
    chosen : dict[int, list[str]]
        by the number of questions, the candidate that each draw chooses
    """

    space: Space
    kl: dict[str, list[float]]
    chosen: dict[int, list[str]]

    @classmethod
    def of(
        cls, space: Space, tried: Sequence[PruningConfig], measured: Measured, seed: int
    ) -> Drawn:
        """Drawn with a seed."""
        kl = {str(c): [k for m in measured.of(POOL, c) for k in m.kl] for c in tried}
        count, drawn = len(kl[str(space.default())]), random.Random(seed)
        chosen: dict[int, list[str]] = {}
        for size in (size for size in SIZES if size <= count):
            draws = [drawn.sample(range(count), size) for _ in range(DRAWS)]
            chosen[size] = [min(kl, key=lambda n: sum(kl[n][p] for p in draw)) for draw in draws]
        return cls(space, kl, chosen)

    @property
    def asked(self) -> list[str]:
        """Candidates whose accuracy is wanted: all that a draw chose, the default, the best."""
        best = sorted(self.kl, key=lambda name: sum(self.kl[name]))[:BEST]
        found = [str(self.space.default()), *best, *itertools.chain(*self.chosen.values())]
        return list(dict.fromkeys(found))

    def row(self, measured: Measured, blocks: Sequence[str]) -> dict[str, Any]:
        """Accuracies of what was chosen."""
        right = {name: accuracy(measured, blocks, name) for name in self.asked}
        kl = {name: statistics.mean(self.kl[name]) for name in self.kl}
        best = max(right, key=lambda name: right[name])
        chooses: dict[str, Any] = {}
        for size, names in self.chosen.items():
            found = [right[name] for name in names]
            chooses[str(size)] = {
                "accuracy": statistics.mean(found),
                "worst": min(found),
                "within": sum(each >= right[best] - WITHIN for each in found),
                "options": sorted(set(names), key=names.count, reverse=True),
            }
        return {
            "space": str(self.space),
            "candidates": len(kl),
            "default": right[str(self.space.default())],
            "best": right[best],
            "best_options": best,
            "unpruned": accuracy(measured, blocks, None),
            "chooses": chooses,
            "rank_correlation": _correlation([kl[n] for n in right], list(right.values())),
            "each": [{"candidate": n, "kl": kl[n], "accuracy": right.get(n)} for n in kl],
        }


def _correlation(kl: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, of little divergence with high accuracy."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    return statistics.correlation(ranks([-v for v in kl]), ranks(right))


def page(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    table = [
        {
            "method": row["space"],
            "candidates": str(row["candidates"]),
            "default": f"{row['default']:.1f}",
            **{
                f"{size} choose": f"{c['accuracy']:.1f} (worst {c['worst']:.1f}), "
                f"{c['within']} of {DRAWS}"
                for size, c in row["chooses"].items()
            },
            "best": f"{row['best']:.1f}",
            "rank correlation": f"{row['rank_correlation']:.2f}",
        }
        for row in rows
    ]
    gains = {
        size: statistics.mean(r["chooses"][size]["accuracy"] - r["default"] for r in rows)
        for size in rows[0]["chooses"]
    }
    gained = [
        f"{size} questions gain {gain:+.1f} points over the defaults on average, and come within "
        f"a point of the best candidate in {sum(r['chooses'][size]['within'] for r in rows)} of "
        f"{DRAWS * len(rows)} draws"
        for size, gain in gains.items()
    ]
    parts = [
        f"`{facts['command']}`",
        f"{facts['machine']}; {facts['versions']}.",
        f"{facts['model']}: accuracy on {facts['held_out']} held-out questions (unpruned "
        f"{rows[0]['unpruned']:.1f}), of what {DRAWS} draws of {', '.join(map(str, SIZES))} out of "
        f"{facts['unlabelled']} other questions choose without their answers: the mean, the worst, "
        "and how many draws are within one point of the best candidate. `rank correlation`: "
        "Spearman's, of divergence with accuracy, of the candidates whose accuracy was measured: "
        f"the default, all that some draw chose, and the {BEST} of least divergence.",
        text_table(table, MARKDOWN),
        "; ".join(gained) + ".",
    ]
    for row in rows:
        each = sorted(row["each"], key=lambda one: one["kl"])
        cells = [
            {
                "candidate": one["candidate"],
                "divergence": f"{one['kl']:.3f}",
                "accuracy": "" if one["accuracy"] is None else f"{one['accuracy']:.1f}",
            }
            for one in each
        ]
        parts += [f"## {row['space']}", text_table(cells, MARKDOWN)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list_checkpoints(), default="llava-shapes")
    parser.add_argument("--methods", default="hivtp,hiprune")
    parser.add_argument("--r-max", default="0.5,0.25,0.11")
    parser.add_argument("--unlabelled", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/tune"))
    args, begun = parser.parse_args(), time.monotonic()
    asked, right = [], {}
    for number, (scene, question) in enumerate(
        exam(exam_for(args.model), args.unlabelled + args.held_out)
    ):
        each = Asked(f"{number:06}", question.text, partial(draw, scene))
        asked.append(each)
        right[each] = question.answer
    # Of every kind of picture, whatever order the exam has them in.
    random.Random(0).shuffle(asked)
    with tempfile.TemporaryDirectory() as folder:
        path = str(checkpoint(folder, args.model))
        opened = open_checkpoint(path, "cpu", dtype=torch.float32, conv_mode=TEMPLATE)
        pool = sheets_of(opened, asked[: args.unlabelled], args.batch)
        spaces = [
            Space(method, {"r_max": float(budget)}, model_of(opened))
            for method in args.methods.split(",")
            for budget in args.r_max.split(",")
        ]
        settings = {
            name: str(value) for name, value in vars(args).items() if name not in ("out", "minutes")
        }
        base = args.out / f"{args.model}-accuracy"
        with keeping(base.with_suffix(".unfinished"), settings) as measured:
            field = Field(opened, {POOL: pool}, measured, new_tokens=10)
            tried = candidates_of(field, spaces)
            drawn = [
                Drawn.of(space, tried[str(space)], measured, seed)
                for seed, space in enumerate(spaces)
            ]
            wanted = {name for each in drawn for name in each.asked}
            every = [c for found in tried.values() for c in found if str(c) in wanted]
            blocks: list[str] = []
            for start in range(args.unlabelled, len(asked), BLOCK):
                if blocks and time.monotonic() - begun > 60 * args.minutes:
                    break
                blocks.append(f"{HELD} {len(blocks)}")
                sheets = sheets_of(opened, asked[start : start + BLOCK], args.batch)
                measure_right(opened, sheets, right, [None, *every], measured, blocks[-1])
            rows = [each.row(measured, blocks) for each in drawn]
            facts = {
                "command": shlex.join(["python", *sys.argv]),
                "machine": machine(torch.device("cpu")),
                "versions": versions(),
                "model": args.model,
                "unlabelled": args.unlabelled,
                "held_out": min(len(blocks) * BLOCK, args.held_out),
            }
            write_json(base.with_suffix(".json"), {**facts, "rows": rows})
            write_whole(base.with_suffix(".md"), page(facts, rows).encode())
            print(page(facts, rows))
            if len(blocks) * BLOCK >= args.held_out:
                measured.throw_away()


if __name__ == "__main__":
    main()
