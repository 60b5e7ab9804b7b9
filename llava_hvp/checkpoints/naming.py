"""What a checkpoint is called, which is a folder's name wherever results are written."""

from __future__ import annotations

from pathlib import Path

from llava_hvp.errors import OptionError

UNNAMED = "unnamed"


def model_name(model_path: str) -> str:
    """As LLaVA calls a model: the last part of its path, two parts for `…/NAME/checkpoint-N`.

    Safe as the name of a file or folder: never empty, `.`, `..` or of several levels.
    """
    name = "_".join(_end(_named(model_path)))
    return UNNAMED if name in ("", ".", "..") else name


def named_path(model_path: str) -> str:
    """`--model-path`; where its end is no name (`.`, `..`, `llava/.`), the folder it leads to.

    LLaVA takes the name from the path, and the kind of model from the name. Raises OptionError for
    a path that leads to nothing with a name.
    """
    path = _named(model_path)
    if not model_path.strip() or not "".join(_end(path)):
        raise OptionError(
            f"--model-path {model_path!r}: that has no name: give a checkpoint's folder, or its "
            "name on the hub"
        )
    return path


def _named(model_path: str) -> str:
    if {"", ".", ".."}.isdisjoint(_end(model_path)):
        return model_path
    return str(Path(model_path).expanduser().resolve())


def _end(model_path: str) -> list[str]:
    parts = model_path.strip("/").split("/")
    return parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:]
