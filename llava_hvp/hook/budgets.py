"""Budgets that training goes through in turns, so that a model learns to do with each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_hvp.hook.audit import PruningAudit


def turn(budgets: Sequence[float], step: int, seed: int) -> float:
    """The budget of one step: all of them in turns, in an order drawn anew for each round.

    It goes by step and seed alone: all ranks have the same, and so does a training that goes on
    from a checkpoint.
    """
    around, place = divmod(step, len(budgets))
    return Random(f"{seed} {around}").sample(list(budgets), len(budgets))[place]


def callback(account: PruningAudit) -> Any:
    """For a trainer of transformers': gives every model of this process the budget of the step."""
    kind = importlib.import_module("transformers.trainer_callback").TrainerCallback

    class Turns(kind):  # type: ignore[misc,valid-type]
        """Before the first batch of each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            account.take_budget(turn(account.request.train_r_max, state.global_step, args.seed))

    return Turns()
