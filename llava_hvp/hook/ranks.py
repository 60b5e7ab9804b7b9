"""The ranks of one training: the same method on each, and one record of them all.

Ranks tell each other through the store by which their process group met, which asks nothing of a
rank that has none of us.
"""

from __future__ import annotations

import functools
import importlib
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from llava_hvp.console import say
from llava_hvp.errors import RecordError, UnsupportedModelError
from llava_hvp.files import write_json
from llava_hvp.hook import budgets
from llava_hvp.pruning.monkeypatch import MonkeyPatcher
from llava_hvp.pruning.record import TRAINED, added, summary

if TYPE_CHECKING:
    from llava_hvp.hook.audit import PruningAudit

# Seconds. Ranks meet while the trainer wraps the model, just before; at the end they may be saving.
AT_BEGIN, AT_END = 60, 600


class Ranks:
    """What this rank tells the others of the same process group, and hears of them.

    Parameters
    ----------
    asked : dict[str, Any]
        what has to be the same on each: method, options
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        self.is_alone = not (distributed.is_available() and distributed.is_initialized())
        self.rank = 0 if self.is_alone else distributed.get_rank()
        self.size = 1 if self.is_alone else distributed.get_world_size()
        self._store = None if self.is_alone else distributed.distributed_c10d._get_default_store()
        self._asked = asked
        self._tell("asked", asked)

    def check(self) -> None:
        """Raise UnsupportedModelError unless all ranks were asked for the same."""
        for rank, theirs in enumerate(self._hear("asked", AT_BEGIN)):
            if theirs is None:
                raise UnsupportedModelError(
                    f"rank {rank} of {self.size} does not prune by llava-hvp, or not yet after "
                    f"{AT_BEGIN} s, and rank {self.rank} on {socket.gethostname()} does: {_REMEDY}"
                )
            found = theirs["asked"]
            if found != self._asked:
                raise UnsupportedModelError(
                    f"rank {rank} on {theirs['host']} was asked for {_shown(found)}, rank "
                    f"{self.rank} on {socket.gethostname()} for {_shown(self._asked)}: {_REMEDY}"
                )

    def merged(self, counts: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What each rank counted, and where; None on all but rank 0.

        Raises RecordError where a rank said nothing.
        """
        self._tell("counts", counts)
        if self.rank:
            return None
        heard = self._hear("counts", AT_END)
        told = [
            {"rank": rank, "host": theirs["host"], **theirs["counts"]}
            for rank, theirs in enumerate(heard)
            if theirs is not None
        ]
        if len(told) < self.size:
            raise RecordError(
                f"{self.size - len(told)} of {self.size} ranks did not tell what they kept within "
                f"{AT_END} s: there is no record of this training"
            )
        return told

    def _tell(self, name: str, what: dict[str, Any]) -> None:
        self._own = {"host": socket.gethostname(), name: what}
        if self._store is not None:
            self._store.set(f"llava_hvp/{name}/{self.rank}", json.dumps(self._own))

    def _hear(self, name: str, seconds: int) -> list[dict[str, Any] | None]:
        """What each rank told, in their order; None of one that said nothing in time."""
        if self._store is None:
            return [self._own]
        keys = [f"llava_hvp/{name}/{rank}" for rank in range(self.size)]
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError:  # torch's own kind of it, for a store that waited long enough
            return [
                json.loads(self._store.get(k)) if self._store.check([k]) else None for k in keys
            ]
        return [json.loads(self._store.get(key)) for key in keys]


_REMEDY = (
    "give the flags on the training command, which goes to every node, or start each node's own "
    "command by `llava-hvp run` with the same flags"
)


def _shown(asked: dict[str, Any]) -> str:
    return " ".join(asked["given"])


def watch_trainers(patches: MonkeyPatcher, account: PruningAudit) -> None:
    """From now on every trainer of transformers' checks its ranks and leaves a record."""
    trainer = importlib.import_module("transformers.trainer").Trainer
    patches.replace(trainer, "__init__", _watched(trainer.__init__, account))


def _watched(stock: Callable[..., None], account: PruningAudit) -> Callable[..., None]:
    callback = importlib.import_module("transformers.trainer_callback").TrainerCallback

    class Watch(callback):  # type: ignore[misc,valid-type]
        """Announces itself before the ranks meet, and looks for the others once they have."""

        def __init__(self) -> None:
            self._ranks = Ranks({name: account.record()[name] for name in ("method", "given")})
            self._began_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._began_at = state.global_step
            self._ranks.check()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ranks = self._ranks.merged(account.totals.as_dict())
            if ranks is not None and any(each["images"] for each in ranks):
                steps = {"first": self._began_at + 1, "last": state.global_step}
                _write(Path(args.output_dir) / TRAINED, account.record(), steps, ranks)

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.add_callback(Watch())
        if account.request.train_r_max:
            self.add_callback(budgets.callback(account))

    return init


def _write(
    path: Path, record: dict[str, Any], steps: dict[str, int], ranks: list[dict[str, Any]]
) -> None:
    counts = added([each for each in ranks if each["images"]])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "steps": steps, "counts": counts, "ranks": ranks})
    except OSError as error:
        raise RecordError(f"{path}: the record cannot be written: {error.strerror}") from error
    hosts = len({each["host"] for each in ranks})
    where = f"{len(ranks)} ranks on {hosts} host{'s' * (hosts > 1)}: {summary(counts)}; "
    say(f"{where * (len(ranks) > 1)}record: {path}")
