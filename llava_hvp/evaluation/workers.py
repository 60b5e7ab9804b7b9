"""The stock scripts at work: a process for each GPU, and a bar that shows how far they are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.errors import EvaluationError
from llava_hvp.evaluation.files import CALLS, LOG, PART_ANSWERS, part_file
from llava_hvp.evaluation.job import Job
from llava_hvp.evaluation.store import Store

POLL = 0.2


def chunks(rows: Sequence[int], count: int) -> list[list[int]]:
    """As the stock scripts cut: equal pieces in order, the last one shorter; none is empty."""
    size = math.ceil(len(rows) / count)
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


@dataclass
class Worker:
    """One stock process and its part."""

    part: Path
    process: subprocess.Popen[bytes]
    log: BinaryIO
    seen: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def read_calls(self) -> list[dict[str, Any]]:
        """The measurements that are new since the last time."""
        path = part_file(self.part, CALLS)
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self.seen)
            whole = file.read().rpartition(b"\n")[0]
        self.seen += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


def answer(job: Job, store: Store, images: Path | None) -> None:
    """Let one process a GPU answer what the store lacks, and wait for all of them.

    Parameters
    ----------
    images : Path | None
        folder of the pictures; None where the question file holds them

    Raises EvaluationError if one of them fails; what the others answer is kept.
    """
    rows = store.remaining
    workers: list[Worker] = []
    command = [sys.executable, "-m", job.benchmark.module, "--model-path", job.model_path]
    command += ["--model-base", job.flags.model_base] if job.flags.model_base else []
    command += ["--image-folder", str(images)] if images is not None else []
    command += job.flags.rest
    with _stopping(workers):
        for number, chunk in enumerate(chunks(rows, len(job.gpus))):
            part = store.parts / str(number)
            own = ["--question-file", str(store.questions.write_part(part, chunk))]
            own += ["--answers-file", str(part_file(part, PART_ANSWERS))]
            workers.append(_start([*command, *own], part, job.request, job.gpus[number]))
        _watch(workers, len(store.answers), len(store.answers) + len(rows))
    failed = [worker for worker in workers if worker.process.returncode]
    if failed:
        raise EvaluationError(_reason(failed[0]))


def _start(command: list[str], part: Path, request: Request, gpu: str) -> Worker:
    flags = config.to_flags(
        dataclasses.replace(
            request,
            train=False,
            reports=None,
            part=str(part.absolute()),
            unpruned=request.pruning is None,
        )
    )
    environ = {**os.environ, config.VARIABLE: shlex.join(flags)}
    environ.pop(config.DEVICE_VARIABLE, None)
    if request.device != "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = part_file(part, LOG).open("wb")
    log.write(f"{shlex.join(command)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    return Worker(part, process, log)


@contextlib.contextmanager
def _stopping(workers: list[Worker]) -> Iterator[None]:
    """However this ends, no worker is left behind."""

    def on_signal(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in workers:
            try:
                worker.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.log.close()
        signal.signal(signal.SIGTERM, before)


def _watch(workers: Sequence[Worker], done: int, total: int) -> None:
    from tqdm import tqdm

    images, kept, begun = 0, 0, None
    # In a file, a line every ten seconds.
    often = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=total, initial=done, unit="q", desc="llava-hvp", mininterval=often) as bar:
        while True:
            working = any(worker.process.poll() is None for worker in workers)
            calls = [call for worker in workers for call in worker.read_calls()]
            for call in calls:
                images += call["images"]
                kept += call["kept_tokens"]
            if calls and images:
                # The first images wait for the model to be loaded, which says nothing of speed.
                begun = begun or (time.monotonic(), images)
                seconds, since = time.monotonic() - begun[0], images - begun[1]
                speed = f"{since / seconds:.2f} images/s, " if since else ""
                bar.set_postfix_str(f"{speed}{kept / images:.0f} tokens kept", refresh=False)
            if calls:
                bar.update(len(calls))
            if not working:
                return
            time.sleep(POLL)


def _reason(worker: Worker) -> str:
    path, code = part_file(worker.part, LOG), worker.process.returncode
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("llava-hvp: error: ")]
    last = (ours or lines[1:] or ["it said nothing"])[-1]
    return (
        f"the stock script ended with exit code {code}: {last.strip()} (all of it: {path}). "
        "Answers that are there are kept: the same command goes on from them"
    )
