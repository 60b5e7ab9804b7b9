"""Several ranks of one program, forked from this process: what it has imported, they need not."""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llava_hvp_startup as startup
import torch
from conftest import Bundle

# A rank that waits for one that is gone would wait for half an hour.
LIMIT = 180  # seconds


@dataclass(frozen=True)
class Rank:
    """How one rank ended: exit code, what it said, what its function gave (None if it failed)."""

    code: int
    said: str
    gave: Any


def run_ranks(body: Callable[[int], Any], world: int = 2, *, launched: bool = True) -> list[Rank]:
    """Run a function in each of `world` forks; how each ended.

    Parameters
    ----------
    launched : bool
        whether they are told of each other, as a launcher does
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        outputs = [Path(folder, str(rank)) for rank in range(world)]
        forks = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            fork = os.fork()
            if fork == 0:
                _run(body, rank, output, common | own if launched else {})
            forks.append(fork)
        codes = _ends(forks)
        return [
            Rank(code, output.with_suffix(".said").read_text(errors="replace"), _given(output))
            for code, output in zip(codes, outputs, strict=True)
        ]


def _run(body: Callable[[int], Any], rank: int, output: Path, environ: dict[str, str]) -> None:
    code = 1
    try:
        said = os.open(output.with_suffix(".said"), os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ.update(environ)
        atexit._clear()  # what the process that forked us is to do at its end
        output.write_bytes(pickle.dumps(body(rank)))
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException as error:
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exc()
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        try:
            atexit._run_exitfuncs()
        finally:
            os._exit(code)


def _ends(forks: list[int]) -> list[int]:
    """Exit codes; where one fails, the others are ended, as every launcher does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT
    while len(codes) < len(forks):
        for fork in set(forks) - set(codes):
            done, status = os.waitpid(fork, os.WNOHANG)
            if done:
                codes[fork] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or any(codes.values()):
            time.sleep(1)  # they may be about to say why
            for fork in set(forks) - set(codes):
                os.kill(fork, signal.SIGKILL)
                codes[fork] = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        time.sleep(0.05)
    return [codes[fork] for fork in forks]


def _given(output: Path) -> Any:
    return pickle.loads(output.read_bytes()) if output.exists() else None


def train(arguments: list[str], request: str) -> None:
    """Run `python -m llava.train.train` in this fork, with our hook awake.

    Parameters
    ----------
    request : str
        as in the variable LLAVA_HVP
    """
    os.environ.update(LLAVA_HVP=request, LLAVA_HVP_DEVICE="cpu")
    name = "llava.train.train"
    sys.argv, sys.orig_argv = ["-m", *arguments], ["python", "-m", name, *arguments]
    startup._finder = None
    startup.wake()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def opened(path: Path, *, trains: bool = False) -> Bundle:
    """As a script opens a LLaVA that is to be partitioned: not by LLaVA's own loader."""
    from llava.model import LlavaLlamaForCausalLM
    from transformers import AutoTokenizer

    model = LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
    tower = model.get_vision_tower()
    tower.load_model()
    tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False)
    return Bundle(path, tokenizer, model.train(trains), tower.image_processor)
