"""The log of a training: a CSV of means over a stretch, headed by command, machine and versions."""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import transformers


class Journal:
    """A row of means for every `options.log_every` seconds of CPU time."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.every = options.log_every
        settings = " ".join(f"{k}={v}" for k, v in vars(options).items() if not isinstance(v, Path))
        self._write(f"# python -m training.{path.stem} {settings}")
        self._write(
            f"# {platform.machine()}, {torch.get_num_threads()} thread, "
            f"{torch.backends.cpu.get_cpu_capability()}; python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}"
        )
        self.begun = time.process_time(), time.time()
        self.last = self.begun[0]
        self.counts = (0, 0)
        self.sums: dict[str, list[float]] = {}
        self.header: list[str] = []

    def add(self, step: int, seen: int, measures: dict[str, float]) -> None:
        """Take one step's measures; write a row of their means now and then."""
        self.counts = step, seen
        for name, value in measures.items():
            values = self.sums.setdefault(name, [])
            if value == value:  # a task that nobody was asked has no share
                values.append(value)
        now = time.process_time()
        if now - self.last >= self.every:
            self.last = now
            self._row()

    def close(self) -> None:
        """Write what is left."""
        if self.sums:
            self._row()
        self.file.close()

    def _row(self) -> None:
        if not self.header:
            self.header = list(self.sums)
            self._write(",".join(("cpu_s", "wall_s", "step", "pictures", *self.header)))
        times = time.process_time() - self.begun[0], time.time() - self.begun[1]
        means = [
            sum(values) / len(values) if (values := self.sums.get(name)) else float("nan")
            for name in self.header
        ]
        columns = [f"{t:.0f}" for t in times] + [f"{n}" for n in self.counts]
        self._write(",".join((*columns, *(f"{m:.4f}" for m in means))))
        self.sums = {}

    def _write(self, line: str) -> None:
        print(line, file=self.file, flush=True)
        print(line, flush=True)
