"""Inside a stock eval script that answers a part of a benchmark for `llava-hvp eval`.

The script itself is LLaVA's, unchanged. Around it: every answer reaches the disk as soon as it is
there, every `generate` is measured, and rows of a table are left out that another part answers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_hvp.console import say
from llava_hvp.evaluation.files import CALLS, ROWS, part_file


def answer_part(part: Path, unpruned: Callable[[], int]) -> None:
    """Prepare this process, in which LLaVA is imported and no model loaded yet.

    Parameters
    ----------
    unpruned : Callable[[], int]
        counts the images that should have been pruned and were not
    """
    from llava_hvp.checkpoints.generate_stats import Call, measure_all
    from llava_hvp.pruning.monkeypatch import MonkeyPatcher

    log = part_file(part, CALLS).open("a", buffering=1)
    parent, calls = os.getppid(), itertools.count()

    def on_call(call: Call) -> None:
        if os.getppid() != parent:  # nobody waits for these answers, and somebody may start anew
            os._exit(1)
        if unpruned():  # before this answer is written: none of them must pass for pruned
            say("error: an image was encoded without pruning, past LLaVA's loader")
            os._exit(1)
        # The first call of a process compiles and allocates: no measure of the method.
        facts = {**dataclasses.asdict(call), "warmup": next(calls) == 0}
        log.write(json.dumps(facts) + "\n")

    patches = MonkeyPatcher()
    measure_all(patches, on_call)
    # The script's own `open`, in the script's own names: model_vqa_loader would keep some thirty
    # answers in memory, which are lost when it is killed.
    script = vars(sys.modules["__main__"])
    script["open"] = functools.partial(_open_by_lines, script.get("open", open))
    rows = part_file(part, ROWS)
    if rows.exists():
        _select_rows(patches, json.loads(rows.read_text()))


def _open_by_lines(
    stock: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any
) -> Any:
    if mode == "w" and not args:
        kwargs.setdefault("buffering", 1)
    return stock(file, mode, *args, **kwargs)


def _select_rows(patches: Any, rows: list[int]) -> None:
    """Let `pandas.read_table` give these rows only.

    A file of just these rows would not do: pandas guesses a column's type from all of it, and
    options that happen to be numbers would no longer be text.
    """
    import pandas

    stock = pandas.read_table

    def read_table(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs).iloc[rows]

    patches.replace(pandas, "read_table", read_table)
