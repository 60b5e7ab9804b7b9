"""Commands that start LLaVA on several machines, each of which has to learn of our flags.

Where the ranks of a training disagree in the end, it fails: see `llava_hvp.hook.ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_hvp import config

# What DeepSpeed's launcher reads, in the home and the current folder, and sends to every node: a
# line KEY=VALUE each. Of the variables here it sends those of Python and the network alone.
_NAME, _DEFAULT = "DS_ENV_FILE", ".deepspeed_env"
_OURS = "deepspeed_env"


def sent_along(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variable by which DeepSpeed's launcher, wherever it runs, sends our own to every node.

    Parameters
    ----------
    environ : Mapping[str, str]
        of the command, with our variables
    folder : Path
        where to write the file, which has the user's own lines too
    """
    found = {Path(place, environ.get(_NAME, _DEFAULT)) for place in (Path.home(), Path.cwd())}
    lines = [line for path in sorted(found) if path.is_file() for line in _lines(path)]
    ours = (config.VARIABLE, config.DEVICE_VARIABLE)
    lines += [f"{name}={environ[name]}" for name in ours if environ.get(name)]
    path = folder / _OURS
    path.write_text("".join(f"{line}\n" for line in lines))
    return {_NAME: str(path)}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


def starts_one_of_several(command: Sequence[str]) -> bool:
    """Whether a command is to be typed on every node, as torchrun's: it reaches this one only."""
    name = os.path.basename(command[0])
    if name == "deepspeed":
        return "--no_ssh" in command
    if name == "accelerate":
        return _most(_value(command, "--num_machines")) > 1
    is_torchrun = name == "torchrun" or "torch.distributed.run" in command
    return is_torchrun and _most(_value(command, "--nnodes")) > 1


def _value(command: Sequence[str], option: str) -> str:
    words = [*command, ""]
    for at, word in enumerate(command):
        name, equals, value = word.replace("-", "_").partition("=")
        if name == option.replace("-", "_"):
            return value if equals else words[at + 1]
    return "1"


def _most(nodes: str) -> int:
    """Of a number, or of a range as torchrun's 1:4."""
    last = nodes.rpartition(":")[2]
    return int(last) if last.isdigit() else 1
