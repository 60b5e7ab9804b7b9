"""Time and memory of a call on any device."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class Clock:
    """Seconds, with everything that was launched before finished.

    Parameters
    ----------
    processor : bool
        what this process computed, of all its threads, in place of what passed: a CPU that others
        use as well gives it away in parts
    """

    def __init__(self, device: torch.device, *, processor: bool = False) -> None:
        self.device, self.look = device, time.process_time if processor else time.perf_counter

    def now(self) -> float:
        """Wait for the device, then look."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.look()

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most bytes that a call holds at once above what was held before.

        On the CPU from every allocation and release that torch's allocator reports: the same
        number in every run, temporaries inside operators included.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        with (
            _quiet(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        live = peak = 0
        for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
            live += event["args"]["Bytes"]
            peak = max(peak, live)
        return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr: torch's profiler logs each start and stop there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
