"""A process that was asked to prune, where it trains: bridged, and unpruned unless it was asked."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import llava_hvp_startup as startup

from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.hook.ranks import watch_trainers
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.runtime import PruningConfig

if TYPE_CHECKING:
    from llava_hvp.hook.audit import PruningAudit

UNPRUNED = "training stays unpruned: give --prune-train to prune it too"


class Training:
    """What one process does around its trainer.

    Parameters
    ----------
    command : str
        as `llava.train.train`; "" for a command that is not LLaVA's own
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self._bridge = MonkeyPatcher()

    def imported(self, request: Request, account: PruningAudit | None) -> None:
        """Bridge the trainer's gaps for whoever imports it. It does not mean that they train."""
        from llava_hvp.hosts.llava.compat.training import bridge_training

        if account is not None:
            bridge_training(self._bridge)
            if request.train or request.pruning is None:
                watch_trainers(self._bridge, account)
        elif request.device == "cpu":
            bridge_training(MonkeyPatcher())
        if self.command in startup.TRAINING:
            _take_command(request.device)

    def watch(
        self,
        trainer: Any,
        request: Request,
        account: PruningAudit | None,
        uninstall: Callable[[], None],
        install: Callable[[PruningConfig, PruningAudit], None],
    ) -> None:
        """LLaVA's `train` leaves pruning off while it runs, unless it was to be pruned too.

        Parameters
        ----------
        trainer : Any
            the module llava.train.train
        uninstall, install : Callable
            what switch pruning off and on again, for what is loaded from then on
        """
        if request.device == "cpu":
            from llava_hvp.hosts.llava.compat.device import without_flash_attention

            trainer.train = without_flash_attention(trainer.train)
        pruning, stock = request.pruning, trainer.train
        if pruning is None or account is None or request.train:
            return

        @functools.wraps(stock)
        def train(*args: Any, **kwargs: Any) -> Any:
            say(UNPRUNED)
            self._bridge.undo()
            uninstall()
            self.imported(request, account)  # the trainer's gaps stay bridged
            try:
                return stock(*args, **kwargs)
            finally:
                self._bridge.undo()
                install(pruning, account)
                self.imported(request, account)

        trainer.train = train


def _take_command(device: str | None) -> None:
    """Make of the script's arguments what this transformers takes, and this device."""
    from llava_hvp.hosts.llava.compat.arguments import named_now, on_cpu
    from llava_hvp.hosts.llava.compat.deepspeed import check_saving
    from llava_hvp.hosts.llava.compat.device import bridge_deepspeed_to_cpu

    check_saving(sys.argv[1:])
    sys.argv[1:] = named_now(sys.argv[1:])
    if device == "cpu":
        sys.argv[1:] = on_cpu(sys.argv[1:])
        has_config = any(word.partition("=")[0] == "--deepspeed" for word in sys.argv)
        if has_config or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            bridge_deepspeed_to_cpu(trains=True)
