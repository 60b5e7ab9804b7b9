"""The version of this package, for the build and for every record, and those of others."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

_read = functools.cache(version)  # half a millisecond of file system; what raises is not kept


def version_of(distribution: str) -> str | None:
    """The version that is installed, None where there is none; nothing is imported."""
    try:
        return _read(distribution)
    except PackageNotFoundError:
        return None


def release_of(number: str | None) -> tuple[int, int]:
    """(major, minor) of a version; (0, 0) where there is none."""
    if number is None:
        return 0, 0
    major, minor = number.split(".")[:2]
    return int(major), int(minor)


def installed(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {name: version_of(name) for name in distributions}
    return {name: number for name, number in found.items() if number is not None}
