"""Sleeps in every Python process, unless LLaVA is to be pruned in it.

Three ways to ask for pruning: our flags on a stock LLaVA command, the variable LLAVA_HVP, which
`llava-hvp run` writes, and Python, which needs none of this. LLAVA_HVP_DISABLE=1 switches the hook
off. It lies outside the package `llava_hvp`, whose import costs time; the line in llava_hvp.pth
imports it only where a variable is set or the command line has a word of ours (Python 3.15 reads
llava_hvp.start instead, which knows no condition).
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
FLAGS = (
    "--prune-method",
    "--prune-from",
    "--prune-tower",
    "--r-max",
    "--num-tokens",
    "--prune-opt",
    "--prune-inside",
    "--inside-r-max",
    "--inside-num-tokens",
    "--inside-opt",
    "--prune-train",
    "--train-r-max",
)
VARIABLES = ("LLAVA_HVP", "LLAVA_HVP_DEVICE")
# Where transformers has the classes of its own that are pruned.
TRANSFORMERS = (
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava_next.modeling_llava_next",
    "transformers.models.llava_onevision.modeling_llava_onevision",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
PACKAGES = ("llava", "transformers")
_HELP = ("-h", "--help")

_finder: LlavaFinder | None = None


def wake() -> None:
    """Watch for the import of LLaVA if this process asked for us; else do nothing."""
    global _finder
    if os.environ.get("LLAVA_HVP_DISABLE", "0") not in ("", "0"):
        return
    if _finder is None and _asked():
        _finder = LlavaFinder()
        _finder.watch()


def _asked() -> bool:
    if any(os.environ.get(name) for name in VARIABLES):
        return True
    command = llava_command()
    flags = (*FLAGS, *_HELP, "--device") if command in EVALUATING else (*FLAGS, *_HELP)
    return command in EVALUATING | SERVING | TRAINING and any(
        str(argument).split("=", 1)[0] in flags for argument in sys.argv[1:]
    )


def llava_command() -> str:
    """The LLaVA command that this process runs, as `llava.eval.model_vqa`; "" for any other.

    `python -m` leaves the module's name in `sys.orig_argv` only, until it runs; a script is known
    by its path, as `llava/eval/model_vqa.py` of a checkout.
    """
    try:
        script = sys.argv[0]
        if script == "-m":
            module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
            if module.startswith("-"):  # as one word: -mllava.eval.model_vqa
                module = module.partition("m")[2]
            return module if module.startswith("llava.") else ""
        if not script.endswith(".py"):
            return ""
        path = os.path.splitext(os.path.abspath(script))[0].split(os.sep)
    except Exception:
        # No arguments, words that are no text, a current directory that is gone: whatever it is,
        # it is no command of LLaVA's, and none of our business.
        return ""
    return ".".join(path[-3:]) if len(path) >= 3 and path[-3] == "llava" else ""


def is_fork() -> bool:
    """Whether this process was forked from the one that the hook woke in."""
    return _finder is not None and _finder.process != os.getpid()


class LlavaFinder:
    """Finds LLaVA as everybody else does, and switches pruning on around its import.

    LLaVA is the package `llava`, or the classes of transformers' own, Qwen2.5-VL's among them.

    command : as `llava.eval.model_vqa`; "" for a command that is not LLaVA's own
    process : the process that asked, of which this one may be a fork
    """

    def __init__(self) -> None:
        self._busy = self._met = False
        # Taken now: the name is gone from sys.argv once the module runs.
        self.command = llava_command()
        self.process = os.getpid()

    def watch(self) -> None:
        """Be asked first for LLaVA, whatever finders come and go, and look back at the end."""
        import atexit

        self._come_first()
        sys.addaudithook(self._on_audit)
        atexit.register(self._at_end)
        if "llava" in sys.modules:  # imported by a .pth file before ours
            self._run_llava(lambda: None, sys.modules["llava"])
        for name in TRANSFORMERS:
            if name in sys.modules:
                self._run_transformers(lambda: None, sys.modules[name])

    def _come_first(self) -> None:
        if sys.meta_path and sys.meta_path[0] is not self:
            sys.meta_path[:] = [self, *(other for other in sys.meta_path if other is not self)]

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An import statement is about to ask the finders.

        Typeguard's and others stand before those that were there, and look for the file themselves.
        """
        if event == "import" and str(arguments[0]).partition(".")[0] in PACKAGES:
            self._come_first()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of a module of LLaVA's, our loader around its own; None for what is not ours."""
        if self._busy or name.partition(".")[0] not in PACKAGES:
            return None
        if name == "llava.train" and self._met:
            _or_exit(self._begin().training_imported)
        # Where `llava` goes past us (importlib.import_module raises no audit event), what it
        # imports first, by a statement, does not.
        if name == "llava" or (name == "llava.model" and not self._met):
            run = self._run_llava
        elif name == "llava.train.train" and self._met:
            run = self._run_training
        elif name in TRANSFORMERS:
            run = self._run_transformers
        else:
            return None
        import importlib.util

        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, run)  # type: ignore[assignment]
        return spec

    def _begin(self) -> Any:
        """The session of this process, which ends here if what it was asked for is wrong."""
        return _or_exit(lambda: _session().begin(self.command))

    def _run_llava(self, execute: Callable[[], Any], module: Any) -> None:
        self._met = True
        session = self._begin()
        if session.prunes:
            _or_exit(execute)
        else:
            execute()
        _or_exit(session.switch_on)

    def _run_training(self, execute: Callable[[], Any], module: Any) -> None:
        execute()
        _or_exit(lambda: self._begin().watch_training(module))

    def _run_transformers(self, execute: Callable[[], Any], module: Any) -> None:
        session = self._begin()
        execute()
        _or_exit(lambda: session.switch_on_transformers(module))

    def _at_end(self) -> None:
        """Whatever loaded LLaVA: asked and not pruned is an error."""
        if any(sys.modules.get(name) for name in ("llava", *TRANSFORMERS)):
            _or_exit(self._begin().check_host)


class _Loader:
    """The stock loader, whose run of the module goes through a function of ours."""

    def __init__(self, stock: Any, run: Callable[[Callable[[], Any], Any], None]) -> None:
        self._stock, self._run = stock, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def create_module(self, spec: Any) -> Any:
        return self._stock.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._stock
        self._run(lambda: self._stock.exec_module(module), module)


def _session() -> Any:
    from llava_hvp.hook import session

    return session


def _or_exit(step: Callable[[], Any]) -> Any:
    """Do a step without which nothing would be pruned; where it fails, the process ends here.

    An exception would not do: LLaVA has a bare `except` of its own, and users have theirs.
    """
    try:
        return step()
    except Exception as error:
        import contextlib

        code = 1
        with contextlib.suppress(Exception):  # no streams: the exit code tells it all the same
            session = sys.modules.get("llava_hvp.hook.session")
            if session is None:
                reason = f"{type(error).__name__}: {error}"
                sys.stderr.write(f"llava-hvp: error: cannot prune: {reason}\n")
            else:
                code = session.refuse(error)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
