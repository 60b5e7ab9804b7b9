"""LLaVA's worker and chat, where a request or a line says by which method an answer is pruned."""

from __future__ import annotations

import builtins
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError, PrunedStateError, shown
from llava_hvp.methods import NONE
from llava_hvp.options import read_option
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.pruning import Pruning

PRUNE = "prune"  # the key of a request
LINE = "/prune"  # what a line of the chat begins with
_OFF = (
    "this model was loaded with --prune-method none, unpruned and untouched: start with a method, "
    "as --prune-method hivtp, to choose among methods and none"
)


def switch_by_request(patches: MonkeyPatcher) -> None:
    """Let requests to the worker that this process runs say how they are pruned."""
    worker = vars(sys.modules["__main__"]).get("ModelWorker")
    stock = getattr(worker, "generate_stream", None)
    if stock is None:
        say(f"warning: this worker is none that is known: {PRUNE!r} in its requests does nothing")
    elif not hasattr(stock, "stock"):
        patches.replace(worker, "generate_stream", _by_request(stock))


def _by_request(stock: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    """Stock's `generate_stream`; what is wrong in our part of a request is told in our words."""

    @functools.wraps(stock)
    def generate_stream(worker: Any, params: dict[str, Any]) -> Iterator[bytes]:
        if PRUNE not in params:
            yield from stock(worker, params)
            return
        given, failed = params[PRUNE], list[LlavaHvpError]()
        pruning: Pruning | None = vars(worker.model).get("llava_hvp")
        generate = worker.model.generate
        try:
            if pruning is not None:
                with pruning.using(given):  # what is wrong is found before the answer begins
                    generate = functools.partial(generate, prune=given)
            elif given not in (None, NONE, {"method": NONE}):
                raise PrunedStateError(_OFF)
        except LlavaHvpError as error:
            yield _told(error)
            return

        def answer(*args: Any, streamer: Any, **kwargs: Any) -> Any:
            try:
                return generate(*args, streamer=streamer, **kwargs)
            except LlavaHvpError as error:  # of a thread, which nobody would hear
                failed.append(error)
                streamer.end()

        model = _View(worker.model, generate=answer)
        yield from stock(_View(worker, model=model), params)
        yield from map(_told, failed)

    generate_stream.stock = stock  # type: ignore[attr-defined]
    return generate_stream


def _told(error: LlavaHvpError) -> bytes:
    """An error in the worker's own form."""
    say(f"a request could not be answered: {error}")
    return json.dumps({"text": f"llava-hvp: {error}", "error_code": 1}).encode() + b"\0"


class _View:
    """An object with some attributes of its own, and all others of another's."""

    def __init__(self, other: Any, **own: Any) -> None:
        vars(self).update(own, _other=other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


class Chat:
    """Stands for `input` in LLaVA's chat: a line that begins with /prune is for us.

    Parameters
    ----------
    pruning : Pruning | None
        of the chat's model; None where it is not pruned
    """

    def __init__(self, pruning: Pruning | None) -> None:
        self._pruning = pruning
        self._block = ExitStack()

    def sit(self) -> None:
        """Be asked for the lines of the chat that this process runs."""
        script = vars(sys.modules["__main__"])
        if "load_pretrained_model" in script:  # else the chat is something else's
            script["input"] = self.input

    def input(self, prompt: str = "") -> str:
        """The next line that is not for us."""
        while True:
            line = builtins.input(prompt)
            words = line.split()
            if words[:1] != [LINE]:
                return line
            try:
                say(self.answer(words[1:]))
            except LlavaHvpError as error:
                say(f"error: {error}; as before: {self._now()}")

    def answer(self, words: list[str]) -> str:
        """Do what a line asks for, in words; raises LlavaHvpError for what cannot be."""
        if self._pruning is None:
            raise PrunedStateError(_OFF)
        if not words:
            return f"{self._now()}; {LINE} NAME [R] [KEY=VALUE …] switches, {LINE} {NONE} unprunes"
        name, options = words[0], dict[str, Any]()
        for word in words[1:]:
            key, value = read_option(name, word if "=" in word else f"r_max={_share(word)}")
            if key in options:
                raise OptionError(f"{key} is given twice: {shown(options[key])}, {shown(value)}")
            options[key] = value
        block = ExitStack()
        block.enter_context(self._pruning.using(name, **options))
        self._block.close()
        self._block = block
        return f"{self._now()}, from the next answer on; the picture is sent so with every answer"

    def _now(self) -> str:
        if self._pruning is None:
            return f"pruning off ({NONE})"
        config = self._pruning.config
        return f"pruning on: {config}" if config.prunes else f"pruning off ({config})"


def _share(word: str) -> float:
    with suppress(ValueError):
        return float(word)
    raise OptionError(f"{LINE} {shown(word)}: give a share, as 0.25, or KEY=VALUE")
