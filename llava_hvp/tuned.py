"""`tuned.json`: what `llava-hvp tune` found, for every command and for `prune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_hvp.errors import OptionError
from llava_hvp.files import write_json
from llava_hvp.runtime import PruningConfig

NEEDED = ("method", "options", "tower")


def write_tuned(path: Path, pruning: PruningConfig, tower: str, facts: dict[str, Any]) -> None:
    """Write what `load_method` reads.

    Parameters
    ----------
    tower : str
        as `tower_digest` gives it
    facts : dict[str, Any]
        how it was found, for people
    """
    found = {"method": pruning.spec, "options": pruning.given, "tower": tower}
    write_json(path, {**found, **facts})


def load_method(path: str | Path) -> PruningConfig:
    """What `llava-hvp tune` found: a method with its options and its running, for `prune`.

    `prune(model, load_method("tuned.json"))` raises UnsupportedModelError on a model with another
    vision tower than the one that was tuned.

    Raises
    ------
    OptionError
        no such file, or not one of `llava-hvp tune`; options that this release does not have
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path} cannot be read: {error}. Give the file that `llava-hvp tune` wrote"
        ) from error
    missing = [n for n in NEEDED if not isinstance(content, dict) or n not in content]
    if missing or not isinstance(content["options"], dict):
        raise OptionError(
            f"{path} has no {' and no '.join(missing) or 'table of options'}: give the file that "
            "`llava-hvp tune` wrote"
        )
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content["options"].items()
    }
    try:
        found = PruningConfig.of(str(content["method"]), **options)
        return replace(found, tower=content["tower"])
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
