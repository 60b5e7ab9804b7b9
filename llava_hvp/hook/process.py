"""A process that was asked to prune, from the import of LLaVA to its first model.

Once `switch_on` was called, either images are pruned or the process ends with an error: silence is
not among the outcomes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava_hvp_startup as startup

from llava_hvp import config
from llava_hvp.config import Request
from llava_hvp.console import say
from llava_hvp.errors import OptionError, RecordError, UnsupportedModelError
from llava_hvp.hook.audit import PruningAudit, leave_report
from llava_hvp.hook.serving import Chat, switch_by_request
from llava_hvp.hook.training import UNPRUNED, Training
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.record import Totals
from llava_hvp.runtime import PruningConfig
from llava_hvp.version import __version__, version_of


class PrunedProcess:
    """What one process was asked, and the switches for it.

    Parameters
    ----------
    command : str
        as `llava.eval.model_vqa`; "" for a command that is not LLaVA's own
    """

    def __init__(self, command: str, request: Request) -> None:
        self.command = command
        self.request = request
        self._account: PruningAudit | None = None
        self._is_on = False
        self._met: set[str] = set()  # modules of transformers' own LLaVA
        self._patched: list[type] = []
        self._patches = MonkeyPatcher()
        self._training = Training(command)

    @property
    def prunes(self) -> bool:
        """Whether pruning was asked for."""
        return self.request.pruning is not None

    # --- before LLaVA is imported ---

    def read_flags(self) -> None:
        """Our flags of the command line, which win over the environment."""
        flags = Request()
        if self.command in startup.EVALUATING | startup.SERVING | startup.TRAINING:
            has_device = self.command in startup.EVALUATING
            flags, sys.argv[1:] = config.parse(sys.argv[1:], device=has_device)
            if {"-h", "--help"} & set(sys.argv[1:]):
                _show_flags_in_help(has_device, self.command in startup.TRAINING)
        self.take(flags)

    def take(self, flags: Request) -> None:
        """Put the flags before the environment; raises a LlavaHvpError for what does not fit."""
        training = self.command in startup.TRAINING
        if flags.train and not training:
            raise OptionError("--prune-train belongs to llava.train.train: leave it out")
        if flags.asked:
            if training and flags.pruning is not None and not flags.train:
                raise OptionError(
                    "--prune-method on a training command: training stays unpruned unless "
                    "--prune-train is given too"
                )
            self.request = dataclasses.replace(
                self.request,
                pruning=flags.pruning,
                train=flags.train,
                unpruned=flags.unpruned,
                train_r_max=flags.train_r_max,
            )
        if self.command == "llava.serve.sglang_worker" and self.prunes:
            raise UnsupportedModelError(
                "llava.serve.sglang_worker runs LLaVA in sglang's own code, which cannot be "
                "pruned: use llava.serve.model_worker"
            )
        if flags.device is not None:
            self.request = dataclasses.replace(self.request, device=flags.device)
        if self.request.device == "cpu":
            # Before torch looks: on a machine with a GPU the model would be loaded there.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            os.environ["DS_ACCELERATOR"] = "cpu"

    # --- after LLaVA is imported ---

    def switch_on(self) -> None:
        """Prune every model that is loaded from now on, and watch that it happens.

        With `none`, bridge stock LLaVA and count what it encodes.
        """
        if self._is_on:  # LLaVA is imported once more
            self.check_host()
            return
        self._is_on = True
        if self.command.startswith("llava.train.") and self.prunes and not self.request.train:
            say(UNPRUNED)
            self.request = dataclasses.replace(self.request, pruning=None, unpruned=True)
        pruning, asked = self.request.pruning, self.request.asked
        if not asked and self.request.device != "cpu" and self.request.part is None:
            return
        from llava_hvp.hosts.llava import compat
        from llava_hvp.hosts.llava.compat.device import bridge_deepspeed_to_cpu, bridge_to_cpu

        if self.request.device == "cpu":
            bridge_to_cpu(MonkeyPatcher())
            bridge_deepspeed_to_cpu(trains=False)
        if pruning is None:
            compat.bridge()
        if not asked:
            self._answer_part(lambda: 0)
            return
        account = self._opened(compat.found_versions())
        if self.command in startup.EVALUATING:
            account.answers.watch()
        self._install(pruning, account)
        self._answer_part(lambda: account.unpruned)

    def switch_on_transformers(self, module: Any) -> None:
        """Prune every model of transformers' own LLaVA classes that is loaded from now on.

        Parameters
        ----------
        module : Any
            where its classes are, imported a moment ago
        """
        if not self.request.asked:
            return
        if module.__name__ in self._met:  # imported once more
            self.check_host()
            return
        self._met.add(module.__name__)
        from llava_hvp.hosts.hf import loading

        found = {name: version_of(name) or "none" for name in ("torch", "transformers")}
        account = self._opened(found)
        self._patched += loading.install(
            self._patches,
            module,
            self.request.pruning,
            before=account.begin,
            on_model=account.watch,
            on_unpruned=account.add_unpruned,
            on_images=account.count,
        )

    def _opened(self, found: dict[str, str]) -> PruningAudit:
        """The account of this process, which names what was found."""
        if self._account is None:
            versions = {"llava-hvp": __version__}
            self._account = PruningAudit(self.command, self.request, self.request.pruning, versions)
        self._account.versions |= found
        return self._account

    def _install(self, pruning: PruningConfig | None, account: PruningAudit) -> None:
        loader = importlib.import_module("llava.model.builder")
        self._patches.replace(
            loader, "load_pretrained_model", self._checking(loader.load_pretrained_model)
        )
        if pruning is None:
            from llava_hvp.hosts.llava.unpruned import count_images

            count_images(self._patches, account.count)
            return
        from llava_hvp.hosts.llava import builder

        builder.install(**pruning.arguments, on_model=account.watch)
        clip = importlib.import_module("llava.model.multimodal_encoder.clip_encoder")
        arch = importlib.import_module("llava.model.llava_arch")
        tower = clip.CLIPVisionTower
        self._patches.replace(tower, "forward", _counting(tower.forward, account))
        self._patched += [tower, arch.LlavaMetaForCausalLM]

    def _answer_part(self, unpruned: Callable[[], int]) -> None:
        """Be a part of `llava-hvp eval`, if this process is one."""
        if self.request.part is not None:
            from llava_hvp.evaluation.worker_hooks import answer_part

            answer_part(Path(self.request.part), unpruned)

    def fails(self, error: BaseException) -> None:
        """The process ends by this error: tell the launcher."""
        if self._account is not None:
            self._account.fails(str(error))
        with contextlib.suppress(RecordError):
            leave_report(self.request, self.command, "failed", Totals(), str(error))

    def check_host(self) -> None:
        """Raise a LlavaHvpError unless LLaVA, if it was used, was used as it was asked for."""
        if not self.request.asked and self.request.device != "cpu":
            return
        past = self.request.asked and any(
            name in sys.modules and name not in self._met for name in startup.TRANSFORMERS
        )
        if past or (sys.modules.get("llava") and not self._is_on):
            raise UnsupportedModelError(
                "LLaVA was imported past llava-hvp, by an import hook of something else, and "
                "nothing was pruned: write `import llava` before that hook is set, or the import "
                "of transformers' own LLaVA class"
            )
        for kind in self._patched:
            module = sys.modules.get(kind.__module__)
            if module is not None and vars(module).get(kind.__name__) is not kind:
                raise UnsupportedModelError(
                    f"{kind.__module__} was imported a second time, or its {kind.__name__} "
                    "replaced: what is made of it is not pruned. Leave out what reloads LLaVA"
                )

    # --- where the process trains ---

    def training_imported(self) -> None:
        """Whoever trains is about to import LLaVA's trainer."""
        self._training.imported(self.request, self._account)

    def watch_training(self, trainer: Any) -> None:
        """The module llava.train.train is there; see `Training.watch`."""
        account, uninstall, install = self._account, self._uninstall, self._install
        self._training.watch(trainer, self.request, account, uninstall, install)

    def _uninstall(self) -> None:
        """What is loaded from now on is stock."""
        from llava_hvp.hosts.llava import builder

        self._patches.undo()
        builder.uninstall()

    # --- where it loads a model ---

    def before_load(self) -> None:
        """A model is about to be loaded."""
        if self._account is not None:
            self._account.begin()

    def after_load(self, tokenizer: Any, model: Any) -> None:
        """Raise a LlavaHvpError unless the loaded model is pruned and ready for its first image."""
        from llava_hvp.hosts.llava.compat.history import bridge_history
        from llava_hvp.hosts.llava.host import check_bound

        if self.request.asked and self.command == "llava.serve.cli":
            bridge_history(model)
            Chat(vars(model).get("llava_hvp")).sit()
        if self.request.asked and self.command == "llava.serve.model_worker":
            switch_by_request(self._patches)
        if not self.prunes:
            return
        pruning = check_bound(model)
        pruning.tokenizer = pruning.tokenizer or tokenizer
        pruning.load_text()
        # Several questions about one picture, and weights that stay.
        pruning.reuse = self.command in startup.SERVING

    def _checking(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The stock loader; what it gives is pruned, or an error."""

        @functools.wraps(stock)
        def load(*args: Any, **kwargs: Any) -> Any:
            self.before_load()
            loaded = stock(*args, **kwargs)
            self.after_load(*loaded[:2])
            return loaded

        return load


def _counting(stock: Callable[..., Any], account: PruningAudit) -> Callable[..., Any]:
    """The stock tower's forward, which a pruned model never calls."""

    @functools.wraps(stock)
    def forward(tower: Any, images: Any) -> Any:
        account.add_unpruned(len(images))
        return stock(tower, images)

    return forward


def _show_flags_in_help(device: bool, train: bool) -> None:
    """Add our flags to the first parser that parses: the stock command's."""
    stock = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        argparse.ArgumentParser.parse_known_args = stock  # type: ignore[method-assign]
        config.add_flags(parser, device=device, train=train)
        return stock(parser, *args, **kwargs)

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[assignment,method-assign]
