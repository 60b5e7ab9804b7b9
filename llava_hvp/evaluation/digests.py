"""What a checkpoint holds, in a form that the next run can be compared with.

Weights are hashed as a whole, since a merge or an edit by hand may change little, and retraining
keeps names and sizes. That is done once: a file whose size, times and inode are those of the last
time is not read again. A cache of the hub calls files after their content: nothing is read there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_hvp.console import say
from llava_hvp.errors import EvaluationError
from llava_hvp.files import write_json

# By part of the checkpoint, the digests of its files by name; None where they are not here (yet).
Digests = dict[str, dict[str, str] | None]

MODEL, BASE, TOWER = "model", "base", "vision tower"
KINDS = (".json", ".safetensors", ".bin", ".model", "merges.txt")
# Beside a checkpoint of the trainer's, but nothing that an answer depends on.
IGNORED = ("trainer_state.json", "_results.json", "training_args.bin")
# The hub's cache keeps contents under their hashes.
BLOB = re.compile(r"/models--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")
CACHE = "checkpoints.json"
# A file may change twice within a tick of the clock that its times are in.
SETTLED = 2.0
LARGE = 1 << 30  # bytes that take long enough for a word
BLOCK = 1 << 22


def digests_of(model_path: str, model_base: str | None, cache: Path | None = None) -> Digests:
    """Digests of all files that answers depend on: of the model, its base and its vision tower.

    Parameters
    ----------
    cache : Path | None
        file in which digests are kept for the next time
    """
    model = _folder(model_path)
    tower = _tower(model)
    folders = {MODEL: model, TOWER: None if tower is None else _folder(tower)}
    if model_base is not None:
        folders[BASE] = _folder(model_base)
    files = {
        part: [] if folder is None else sorted(filter(_matters, folder.iterdir()))
        for part, folder in folders.items()
    }
    known = _Known(cache)
    by_path = known.digests([path for paths in files.values() for path in paths], model_path)
    return {
        part: {path.name: by_path[path] for path in paths} if folders[part] else None
        for part, paths in files.items()
    }


def difference(before: Any, now: Digests) -> str | None:
    """What tells two checkpoints apart, in words; None if nothing does.

    A part that was not here before may be anything now.
    """
    if not isinstance(before, dict):
        return (
            "they are from a release that knew a checkpoint by names and sizes only, so its "
            "weights may have changed since"
        )
    for part in {**before, **now}:
        then, here = before.get(part, {}), now.get(part, {})
        if then is None or then == here:
            continue
        if here is None:
            return f"the files of the {part} are no longer here"
        name = next(name for name in {**then, **here} if then.get(name) != here.get(name))
        verb = "is new" if name not in then else "is gone" if name not in here else "has changed"
        return f"{name} of the {part} {verb}"
    return None


def _matters(path: Path) -> bool:
    return path.name.endswith(KINDS) and not path.name.endswith(IGNORED) and path.is_file()


def _folder(name: str) -> Path | None:
    """Where the files of a checkpoint are: a folder, or the snapshot that the hub's cache has."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    root = _hub_cache() / f"models--{name.strip('/').replace('/', '--')}"
    with contextlib.suppress(OSError):  # nothing of that name, or not downloaded as `main`
        snapshot = root / "snapshots" / (root / "refs" / "main").read_text().strip()
        if snapshot.is_dir():
            return snapshot
    return None


def _hub_cache() -> Path:
    """Where transformers looks; up to release 4 it has variables of its own."""
    from huggingface_hub import constants

    if int(importlib.metadata.version("transformers").partition(".")[0]) < 5:
        older = [os.environ.get(n) for n in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE")]
        return Path(next(filter(None, older), constants.HF_HUB_CACHE))
    return Path(constants.HF_HUB_CACHE)


def _tower(folder: Path | None) -> str | None:
    """As LLaVA finds it in the config."""
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("mm_vision_tower", config.get("vision_tower"))
    except (OSError, ValueError, AttributeError):  # LLaVA will say so
        return None
    return name if isinstance(name, str) else None


class _Known:
    """Digests of files that have been read before."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._entries: dict[str, list[Any]] = {}
        if cache is not None:
            with contextlib.suppress(OSError, ValueError):  # as good as none
                content = json.loads(cache.read_text(encoding="utf-8"))
                self._entries = content if isinstance(content, dict) else {}

    def digests(self, paths: Sequence[Path], name: str) -> dict[Path, str]:
        """The digest of each file; `name` is for the word about it."""
        found = {path: self._without_reading(path) for path in paths}
        unread = [path for path, digest in found.items() if digest is None]
        size = sum(path.stat().st_size for path in unread)
        if size >= LARGE:
            say(
                f"reading {size / 1e9:.1f} GB of {name} to know it again; not done anew while its "
                "files stay as they are"
            )
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            read = dict(zip(unread, pool.map(self._read, unread), strict=True))
        if unread and self._cache is not None:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._cache, self._entries)
        return {path: digest or read[path] for path, digest in found.items()}

    def _without_reading(self, path: Path) -> str | None:
        target = path.resolve()
        if path.is_symlink() and BLOB.search(target.as_posix()):
            return target.name
        entry = self._entries.get(str(target))
        return entry[-1] if entry and entry[:-1] == _state(target) else None

    def _read(self, path: Path) -> str:
        target = path.resolve()
        before = _state(target)
        digest = hashlib.sha256()
        try:
            with target.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise EvaluationError(f"cannot read {path} of the checkpoint: {error}") from error
        text = digest.hexdigest()[:32]
        settled = time.time() - max(before[1:3]) / 1e9 > SETTLED
        if settled and _state(target) == before:
            self._entries[str(target)] = [*before, text]
        else:
            self._entries.pop(str(target), None)
        return text


def _state(path: Path) -> list[int]:
    """What changes when a file does; the change time even where the time was put back."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
