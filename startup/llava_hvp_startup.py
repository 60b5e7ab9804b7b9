"""Runs at the start of every Python process, and sleeps unless a LLaVA command is to be pruned.

Three ways to ask for pruning: our flags on a stock LLaVA command, the variable LLAVA_HVP, which
`llava-hvp run` writes, and Python, which needs none of this. LLAVA_HVP_DISABLE=1 switches the hook
off. It lies outside the package `llava_hvp`, whose import brings torch.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the module `typing` costs more than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Commands that take --device themselves; the others get ours.
SERVING = {"llava.serve.cli", "llava.serve.model_worker"}
EVALUATING = {
    "llava.eval.model_vqa",
    "llava.eval.model_vqa_loader",
    "llava.eval.model_vqa_mmbench",
    "llava.eval.model_vqa_science",
    "llava.eval.run_llava",
}
TRAINING = {"llava.train.train", "llava.train.train_mem", "llava.train.train_xformers"}
FLAGS = ("--prune-method", "--prune-opt", "--prune-train", "--r-max", "--num-tokens")
VARIABLES = ("LLAVA_HVP", "LLAVA_HVP_DEVICE")
_HELP = ("-h", "--help")


def wake() -> None:
    """Watch for the import of `llava` if this process asked for us; else do nothing."""
    if os.environ.get("LLAVA_HVP_DISABLE", "0") not in ("", "0"):
        return
    if not any(isinstance(finder, LlavaFinder) for finder in sys.meta_path) and _asked():
        sys.meta_path.insert(0, LlavaFinder())


def _asked() -> bool:
    if any(os.environ.get(name) for name in VARIABLES):
        return True
    command = llava_command()
    flags = (*FLAGS, *_HELP, "--device") if command in EVALUATING else (*FLAGS, *_HELP)
    return command in EVALUATING | SERVING | TRAINING and any(
        argument.split("=", 1)[0] in flags for argument in sys.argv[1:]
    )


def llava_command() -> str:
    """The LLaVA command that this process runs, as `llava.eval.model_vqa`; "" for any other.

    `python -m` leaves the module's name in `sys.orig_argv` only, until it runs; a script is known
    by its path, as `llava/eval/model_vqa.py` of a checkout.
    """
    argv = getattr(sys, "argv", [])
    script = argv[0] if argv else ""
    if script == "-m":
        module = sys.orig_argv[len(sys.orig_argv) - len(argv)]
        if module.startswith("-"):  # as one word: -mllava.eval.model_vqa
            module = module.partition("m")[2]
        return module if module.startswith("llava.") else ""
    path = os.path.splitext(os.path.abspath(script))[0].split(os.sep)
    is_llava = script.endswith(".py") and len(path) >= 3 and path[-3] == "llava"
    return ".".join(path[-3:]) if is_llava else ""


class LlavaFinder:
    """Finds `llava` as everybody else does, and switches pruning on around its import."""

    def __init__(self) -> None:
        self._busy = False
        # Taken now: the name is gone from sys.argv once the module runs.
        self.command = llava_command()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of `llava`, with our loader around its own; None for every other name."""
        if name == "llava.train" and "llava_hvp.hook.process" in sys.modules:
            _or_exit(sys.modules["llava_hvp.hook.process"].training_begins)
        if name != "llava" or self._busy:
            return None
        import importlib.util

        self._busy = True
        try:
            spec = importlib.util.find_spec("llava")
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.command)  # type: ignore[assignment]
        return spec


class _Loader:
    """Runs the stock loader between the two halves of our session."""

    def __init__(self, stock: Any, command: str) -> None:
        self._stock, self._command = stock, command

    def create_module(self, spec: Any) -> Any:
        return self._stock.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._stock
        session = _or_exit(lambda: _begin(self._command))
        if session.prunes:
            _or_exit(lambda: self._stock.exec_module(module))
        else:
            self._stock.exec_module(module)
        _or_exit(session.switch_on)


def _begin(command: str) -> Any:
    from llava_hvp.hook import process as session

    return session.begin(command)


def _or_exit(step: Callable[[], Any]) -> Any:
    """Do a step without which nothing would be pruned; where it fails, the process ends here.

    An exception would not do: LLaVA has a bare `except` of its own, and users have theirs.
    """
    try:
        return step()
    except Exception as error:
        session = sys.modules.get("llava_hvp.hook.process")
        if session is None:
            _say(f"llava-hvp: error: cannot prune: {type(error).__name__}: {error}")
            code = 1
        else:
            code = session.refuse(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
