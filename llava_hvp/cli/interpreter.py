"""Whether another Python runs our startup hook."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

_ASK = "import sys; print('llava_hvp_startup' in sys.modules, sys.executable)"
_ASKED = {"LLAVA_HVP": "--prune-method uniform", "LLAVA_HVP_DISABLE": "0"}  # or it sleeps


def hook_in(
    python: Sequence[str] = ("python",), environ: Mapping[str, str] | None = None
) -> tuple[bool, str] | None:
    """(whether its hook runs, where it lies) of a Python with options; None if there is none."""
    try:
        answer = subprocess.run(
            [*python, "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**(os.environ if environ is None else environ), **_ASKED},
        ).stdout.split(maxsplit=1)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] == "True", answer[1].strip()


def python_of(command: Sequence[str]) -> list[str]:
    """The Python that a command line starts, with its own options; [] for another command."""
    if not command[0].rpartition("/")[2].startswith("python"):
        return []
    end = 1
    while end < len(command) and command[end].startswith("-") and command[end] not in ("-c", "-m"):
        end += 2 if command[end] in ("-W", "-X") else 1
    return list(command[:end])
