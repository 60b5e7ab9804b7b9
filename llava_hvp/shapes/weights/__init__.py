"""The shipped checkpoints, and a copy of them that LLaVA's stock loader opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_hvp.errors import OptionError

CHECKPOINTS = ("llava-shapes", "llava-shapes-next")
TOWER = "vision-tower"  # one CLIP for all of them


def list_checkpoints() -> list[str]:
    """Names of the checkpoints that are here."""
    return [name for name in CHECKPOINTS if (Path(__file__).parent / name).is_dir()]


def checkpoint(folder: str | Path, name: str = CHECKPOINTS[0]) -> Path:
    """Write a checkpoint to `folder`/`name`, its vision tower inside; return that path.

    LLaVA's config names the vision tower by its absolute path, so the copy must not be moved: call
    this again instead. Files that are there already are written anew.

    Parameters
    ----------
    name
        ``"llava-shapes"`` (LLaVA-1.5) or ``"llava-shapes-next"`` (AnyRes).

    Raises
    ------
    OptionError
        If there is no checkpoint of that name.
    """
    source = Path(__file__).parent
    if name not in list_checkpoints():
        raise OptionError(f"no checkpoint {name!r}: give one of {', '.join(list_checkpoints())}")
    target = Path(folder).resolve() / name
    shutil.copytree(source / name, target, dirs_exist_ok=True)
    shutil.copytree(source / TOWER, target / TOWER, dirs_exist_ok=True)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["mm_vision_tower"] = str(target / TOWER)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target
