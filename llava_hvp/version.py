"""The version of this package, for the build and for every record, and those of others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def version_of(distribution: str) -> str | None:
    """The version that is installed, None where there is none; nothing is imported."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def installed(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {name: version_of(name) for name in distributions}
    return {name: number for name, number in found.items() if number is not None}
