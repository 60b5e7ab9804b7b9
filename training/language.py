"""Stage 2: projector and language model on the frozen tower's features.

    python -m training.language POOL TOWER_FOLDER OUT

All questions on a picture share its prefix: one sequence holds the prefix once and the
conversations behind it, each of which sees the prefix and itself only, at the positions it would
have alone. Logits are those of the plain sequences (tests/test_shapes.py compares them).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from llava_hvp.shapes.questions import TASKS
from llava_hvp.shapes.scenes import Scene
from llava_hvp.testing.tokenizers import write_llama_tokenizer
from training.llama import HIDDEN, Language
from training.loop import add_options, batches, train
from training.models import Masters, Vision
from training.pool import GRID, PATCHES, open_pool, plan
from training.prompts import (
    TEMPLATES,
    VOCABULARY,
    Prompts,
    Segment,
    Template,
    pack,
    tokenizer_text,
)
from training.tower import HEADS, INNER, LAYERS, WIDTH, normalise
from training.tower import STATE as TOWER_STATE

LANGUAGE = {"width": 192, "heads": 4, "inner": 512, "layers": 5}
MAX_LENGTH = 2048
STATE = "language.pt"
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def load_tower(folder: Path) -> Vision:
    """The tower that `training.tower` saved there, in bfloat16."""
    tower = Vision(WIDTH, HEADS, INNER, LAYERS, GRID)
    state = torch.load(folder / TOWER_STATE)
    own = {k.removeprefix("vision."): v for k, v in state.items() if k.startswith("vision.")}
    tower.load_state_dict(own)
    return tower.bfloat16().requires_grad_(False)


def masks(prefix: int, shown: Tensor, owners: Tensor) -> Tensor:
    """(B, 1, room, L) bfloat16, what is added to scores of the conversations: 0 or HIDDEN.

    Parameters
    ----------
    prefix : tokens before the picture
    shown : (B, tokens) bool, False for what fills up a picture that has fewer
    owners : (B, room) the conversation that a token belongs to
    """
    batch, room = owners.shape
    own = (owners[:, :, None] == owners[:, None]) & torch.ones(room, room, dtype=torch.bool).tril()
    before = torch.cat((torch.ones(batch, prefix, dtype=torch.bool), shown), 1)
    seen = torch.cat((before[:, None].expand(-1, room, -1), own), 2)
    return torch.where(seen, 0.0, HIDDEN).bfloat16()[:, None]


def picture_positions(count: int, random: np.random.RandomState, share: float) -> np.ndarray:
    """(count + 1,) positions of a picture's tokens from 0, and the one of what follows.

    A share of them is compressed at random, so that no answer lives from where in the sequence a
    patch's token is; which patches are seen does not change.
    """
    if random.rand() >= share:
        return np.arange(count + 1)
    span = random.randint(count // 10, count + 1)
    inside = np.sort(random.randint(0, span, count))
    return np.append(inside, span)


def targets_of(segments: list[list[Segment]], room: int) -> list[tuple[str, int, int]]:
    """(task, first, last) of every answer, in tokens of the flattened conversations."""
    found = []
    for row, mine in enumerate(segments):
        at = row * room
        for segment in mine:
            found += [(task, at + first, at + last) for task, first, last in segment.turns]
            at += len(segment.ids)
    return found


class Asker:
    """Draws batches of conversations on scenes, as the tensors that `Language` takes."""

    def __init__(self, prompts: Prompts, room: int, jitter: float, seed: int) -> None:
        self.prompts, self.room, self.jitter = prompts, room, jitter
        self.random, self.numbers = Random(seed), np.random.RandomState(seed)

    def template(self) -> Template:
        """Drawn for a batch."""
        templates, weights = zip(*TEMPLATES.values(), strict=True)
        drawn: Template = self.random.choices(templates, weights)[0]
        return drawn

    def batch(
        self, scenes: list[Scene], counts: list[int], tokens: int
    ) -> tuple[dict[str, Tensor], list[tuple[str, int, int]]]:
        """For pictures of so many tokens each (`counts`), filled up to `tokens`; one template."""
        template = self.template()
        prefix = self.prompts.prefix(template)
        segments = [self.prompts.segments(s, self.random, self.room, template) for s in scenes]
        packed = [pack(mine, self.room) for mine in segments]
        ids, targets, owners, steps = (np.stack(parts) for parts in zip(*packed, strict=True))
        text = len(prefix)
        start = text + tokens
        positions = np.zeros((len(scenes), start + self.room), np.int64)
        for row, count in enumerate(counts):
            inside = picture_positions(count, self.numbers, self.jitter)
            positions[row, :text] = np.arange(text)
            positions[row, text : text + count] = text + inside[:-1]
            positions[row, start:] = text + inside[-1] + steps[row]
        batch = {
            "prefix": torch.tensor(prefix),
            "ids": torch.from_numpy(ids),
            "targets": torch.from_numpy(targets),
            "positions": torch.from_numpy(positions),
            "owners": torch.from_numpy(owners),
            "shown": torch.arange(tokens) < torch.tensor(counts)[:, None],
        }
        return batch, targets_of(segments, self.room)


def answer_logits(
    model: Language, batch: dict[str, Tensor], picture: Tensor, forward: Forward | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where an answer is wanted, the right tokens, and where (flat index) that is.

    picture : (B, tokens, width) embeddings
    forward : `model`, compiled
    """
    prefix = model.token[batch["prefix"]].expand(len(picture), -1, -1)
    x = torch.cat((prefix, picture, model.token[batch["ids"]]), 1)
    targets = batch["targets"].flatten()
    wanted = (targets != -100).nonzero()[:, 0]
    mask = masks(prefix.shape[1], batch["shown"], batch["owners"]).to(x.dtype)
    # A multiple of so many rows, so that a compiled forward is compiled once.
    rows = F.pad(wanted, (0, -len(wanted) % 2048))
    run = model if forward is None else forward
    logits = run(x, model.rotary(batch["positions"]), mask, rows)[: len(wanted)]
    return logits, targets[wanted], wanted


def answer_loss(
    model: Language,
    batch: dict[str, Tensor],
    turns: list[tuple[str, int, int]],
    picture: Tensor,
    forward: Forward,
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and by task the share of right answers; of what `Asker.batch` gave."""
    logits, targets, wanted = answer_logits(model, batch, picture, forward)
    loss = F.cross_entropy(logits.float(), targets)
    return loss, right_by_task(logits.argmax(-1) == targets, wanted, turns)


def right_by_task(
    hits: Tensor, wanted: Tensor, turns: list[tuple[str, int, int]]
) -> dict[str, float]:
    """Share of answers of which every token, </s> too, is the likeliest; NaN for none."""
    wrong = set(wanted[~hits].tolist())
    totals: dict[str, list[int]] = {task: [] for task in TASKS}
    for task, first, last in turns:
        totals[task].append(not any(at in wrong for at in range(first, last + 1)))
    return {task: sum(v) / len(v) if v else float("nan") for task, v in totals.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train projector and language model.")
    parser.add_argument("pool", type=Path)
    parser.add_argument("tower", type=Path, help="what training.tower wrote")
    parser.add_argument("out", type=Path)
    add_asker_options(parser)
    add_options(parser, minutes=36, batch=16, rate=1.2e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_llama_tokenizer(
        options.out, model_max_length=MAX_LENGTH, text=tokenizer_text(), vocab_size=VOCABULARY
    )
    asker = Asker(Prompts(options.out), options.room, options.jitter, options.seed)
    tower = load_tower(options.tower)
    model = Language(VOCABULARY, WIDTH, **LANGUAGE)
    masters = Masters(model)
    forward = torch.compile(model, dynamic=False)
    see = torch.compile(tower.features, dynamic=False)
    pool = open_pool(options.pool)
    drawn = batches(
        np.flatnonzero(pool["whole"]), options.batch, np.random.RandomState(options.seed + 1)
    )

    def step(done: float) -> tuple[Tensor, int, dict[str, float]]:
        rows = next(drawn)
        with torch.no_grad():
            features = see(normalise(pool["pixels"][rows]))
        scenes = [plan(int(seed))[0] for seed in pool["seed"][rows]]
        batch, turns = asker.batch(scenes, [PATCHES] * len(scenes), PATCHES)
        loss, right = answer_loss(model, batch, turns, model.picture(features), forward)
        return loss, len(rows), right

    train(options, "language.csv", STATE, masters, step)


def add_asker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--room", type=int, default=176, help="tokens of conversations a picture")
    parser.add_argument("--jitter", type=float, default=0.4, help="share of moved positions")


if __name__ == "__main__":
    main()
