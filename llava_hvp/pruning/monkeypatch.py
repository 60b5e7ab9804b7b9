"""Replacing attributes of a host's modules and classes, with an undo that is exact."""

from __future__ import annotations

from typing import Any


class MonkeyPatcher:
    """A set of replaced attributes. Undone as a whole, newest first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, bool, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, remembering whether the owner had it itself or inherited it."""
        own = name in vars(owner)
        self._undo.append((owner, name, own, vars(owner).get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            owner, name, own, value = self._undo.pop()
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
