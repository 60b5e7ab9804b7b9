"""The answers file of an eval script: one run's at a time, and every byte of it accounted for."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_hvp.console import say
from llava_hvp.errors import RecordError
from llava_hvp.pruning.record import answers_facts, record_path


class AnswersFile:
    """The file that a script's `--answers-file` names, as this process writes it.

    The script's own `open` is watched, so that what it wrote is known byte by byte, and the file is
    locked while this process lives. The lock is one on the file itself: there is no other file to
    leave behind, and it ends with the process however that ends.

    Parameters
    ----------
    path : Callable[[], Path | None]
        of the file; None where the command has none, or does not say yet
    """

    def __init__(self, path: Callable[[], Path | None]) -> None:
        self._path = path
        self._stream: io.TextIOWrapper | None = None
        self._written: Any = None  # a SHA-256, once the file was opened for writing
        self._lines_before = 0
        self._lock: int | None = None
        self._warned = False

    @property
    def path(self) -> Path | None:
        """The path of the answers file; None where there is none."""
        return self._path()

    def watch(self) -> None:
        """Stand for `open` in the script that this process runs."""
        vars(sys.modules["__main__"])["open"] = self.open
        if hasattr(os, "register_at_fork"):
            # A worker that outlives a killed parent must not keep its lock.
            os.register_at_fork(after_in_child=self._release)

    def claim(self) -> None:
        """Keep other runs out of the file, if it is there; what is said of it is true no longer.

        Raises RecordError where another run has it.
        """
        path = self.path
        if path is None:
            return
        if path.is_file():
            self._hold(path, os.O_WRONLY)
        self._forget(path)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """The built-in `open`; what is written to the answers file is noted.

        Raises RecordError where another run has that file, before anything is done to it.
        """
        path = self.path
        kind = mode.replace("t", "")
        if path is None or kind not in ("w", "a") or not _same_name(file, path):
            return open(file, mode, *args, **kwargs)
        if path.exists() and not path.is_file():  # /dev/null, a pipe
            return open(file, mode, *args, **kwargs)
        self._hold(path, os.O_WRONLY | os.O_CREAT)
        self._forget(path)
        self._begin(path.read_bytes() if kind == "a" and path.exists() else b"")
        self._stream = _open_text(_Witness(file, kind, self._written), mode, *args, **kwargs)
        return self._stream

    def _begin(self, before: bytes) -> None:
        """What the file holds when it is opened."""
        digest = hashlib.sha256(before)
        if self._written is None or digest.digest() != self._written.digest():
            self._lines_before = before.count(b"\n")
        self._written = digest

    def facts(self) -> dict[str, Any] | None:
        """What the record says of the file; None where this process wrote none.

        Raises RecordError unless the file holds what this process wrote to it, all of that and
        nothing else.
        """
        path = self.path
        if path is None or self._written is None or self._stream is None:
            return None
        try:
            if not self._stream.closed:
                self._stream.flush()
            facts = answers_facts(path)
        except OSError as error:
            raise RecordError(f"{path}: the answers cannot be read: {error.strerror}") from error
        if facts["sha256"] != self._written.hexdigest():
            raise RecordError(
                f"{path}: something else has written to this file while this process did, or has "
                "replaced it: no record is left beside it. Answer again, each run to a file of its "
                "own"
            )
        return facts | ({"lines_before": self._lines_before} if self._lines_before else {})

    def _forget(self, path: Path) -> None:
        """Take away the record of an earlier run."""
        try:
            record_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise RecordError(
                f"{record_path(path)}: the record of an earlier run cannot be removed: "
                f"{error.strerror}. Remove it, or give another --answers-file"
            ) from error

    def _hold(self, path: Path, flags: int) -> None:
        """Lock the file; raises RecordError where another run has."""
        if self._lock is not None:
            if _same_file(self._lock, path):
                return
            self._release()
        try:
            lock = os.open(path, flags, 0o666)
        except OSError:
            return  # the script opens it too, and says what is wrong in its own words
        try:
            import fcntl  # not on Windows

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            os.close(lock)
            if isinstance(error, OSError) and error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RecordError(
                    f"{path}: another run is writing these answers: wait for its end, or give "
                    "another --answers-file"
                ) from None
            self._warn(path, error)
            return
        self._lock = lock

    def _warn(self, path: Path, error: Exception) -> None:
        if not self._warned:
            say(
                f"warning: {path}: no lock can be had here ({error}): a second run on this file "
                "would be found out at the end only"
            )
        self._warned = True

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


class _Witness(io.FileIO):
    """A file that notes what was written to it."""

    def __init__(self, file: Any, mode: str, written: Any) -> None:
        super().__init__(file, mode)
        self._written = written

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._written.update(memoryview(data)[:count])
        return count


def _open_text(
    raw: io.FileIO,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> io.TextIOWrapper:
    """As the built-in `open` makes a text file of a raw one."""
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw, size), encoding, errors, newline, line_buffering=buffering == 1
    )
    stream.mode = mode  # type: ignore[misc]
    return stream


def _same_name(file: Any, path: Path) -> bool:
    is_name = isinstance(file, (str, os.PathLike))
    return is_name and os.path.abspath(file) == os.path.abspath(path)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
