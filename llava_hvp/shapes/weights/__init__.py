"""The shipped checkpoints, and a copy of them that LLaVA's stock loader opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_hvp.errors import OptionError

CHECKPOINTS = ("llava-shapes", "llava-shapes-next")
TOWER = "vision-tower"  # one CLIP for all of them
SHIPPED = Path(__file__).parent


def list_checkpoints(source: str | Path = SHIPPED) -> list[str]:
    """Names of the checkpoints that are there."""
    return [name for name in CHECKPOINTS if (Path(source) / name).is_dir()]


def checkpoint(
    folder: str | Path, name: str = CHECKPOINTS[0], source: str | Path = SHIPPED
) -> Path:
    """Write a checkpoint to `folder`/`name`, its vision tower inside; return that path.

    LLaVA's config names the vision tower by its absolute path, so the copy must not be moved: call
    this again instead. Files that are there already are written anew.

    Parameters
    ----------
    name
        ``"llava-shapes"`` (LLaVA-1.5) or ``"llava-shapes-next"`` (AnyRes).
    source
        Where `python -m training OUT --to SOURCE` wrote them; those of this package without.

    Raises
    ------
    OptionError
        If there is no checkpoint of that name.
    """
    if name not in (known := list_checkpoints(source)):
        raise OptionError(
            f"no checkpoint {name!r} in {source}: there is {', '.join(known) or 'none'}"
        )
    target = Path(folder).resolve() / name
    shutil.copytree(Path(source) / name, target, dirs_exist_ok=True)
    shutil.copytree(Path(source) / TOWER, target / TOWER, dirs_exist_ok=True)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["mm_vision_tower"] = str(target / TOWER)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target
