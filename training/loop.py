"""What the stages share: the budget, the learning rate, the log, the state that is saved."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from training.journal import Journal
from training.models import Masters, learning_rate

SAVED_EVERY = 120.0  # seconds of CPU time
# From the share of the budget that is used to the loss, its number of pictures, measures to log.
Step = Callable[[float], tuple[Tensor, int, dict[str, float]]]


def add_options(
    parser: argparse.ArgumentParser, *, minutes: float, batch: int, rate: float
) -> None:
    parser.add_argument("--minutes", type=float, default=minutes, help="of CPU time")
    parser.add_argument("--steps", type=int, help="end after so many, if that comes first")
    parser.add_argument("--batch", type=int, default=batch, help="pictures")
    parser.add_argument("--rate", type=float, default=rate, help="the highest of the learning rate")
    parser.add_argument("--log-every", type=float, default=20, help="seconds of CPU time")
    parser.add_argument("--seed", type=int, default=0)


def train(options: argparse.Namespace, log: str, state: str, masters: Masters, step: Step) -> None:
    """Step until the budget is used; write `log` and `state` into the stage's folder."""
    journal = Journal(options.out / log, options)
    begun = saved = time.process_time()
    seen = 0
    for number in itertools.count():
        done = (time.process_time() - begun) / 60 / options.minutes
        if options.steps:
            done = max(done, number / options.steps)
        if done >= 1:
            break
        loss, pictures, measures = step(done)
        loss.backward()
        norm = masters.step(learning_rate(done, options.rate))
        seen += pictures
        journal.add(number + 1, seen, {"loss": loss.item(), "norm": norm, **measures})
        if time.process_time() - saved > SAVED_EVERY:
            saved = time.process_time()
            torch.save(masters.state(), options.out / state)
    journal.close()
    torch.save(masters.state(), options.out / state)
    print("done", flush=True)


def batches(rows: np.ndarray, size: int, draw: np.random.RandomState) -> Iterator[np.ndarray]:
    """Sorted rows, `size` at a time, every row once before any comes again; without end."""
    if len(rows) < size:
        raise SystemExit(f"a batch of {size} from {len(rows)} pictures: draw a larger pool")
    while True:
        order = draw.permutation(rows)
        for start in range(0, len(order) - size + 1, size):
            yield np.sort(order[start : start + size])
