"""What the measuring subcommands share: lists of budgets, a bar, results in a folder."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from llava_hvp.cli.extras import need
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.evaluation.digests import MODEL, Digests, digests_of
from llava_hvp.evaluation.digests import TOWER as VISION_TOWER
from llava_hvp.files import write_whole
from llava_hvp.lazy import torch
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes.weights import SHIPPED, TOWER
from llava_hvp.tuned import load_method

Value = TypeVar("Value")


def exclude(args: argparse.Namespace, one: str, other: str) -> None:
    """Raise OptionError where both are given; names as attributes, of flags."""
    if getattr(args, one) and getattr(args, other):
        raise OptionError(f"{_flag(one)} and {_flag(other)} exclude each other: give one of them")


def at_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Raise OptionError for a number below the least that makes sense."""
    if getattr(args, name) < least:
        raise OptionError(f"{_flag(name)} {getattr(args, name)}: give at least {least}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_loading(parser: Any) -> None:
    """Add how a checkpoint is loaded: what of, in which template, quantised, where."""
    parser.add_argument("--model-base", help="as LLaVA's commands take it")
    parser.add_argument(
        "--conv-mode", help="LLaVA's conversation template; by default what fits the name"
    )
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def bits_of(args: argparse.Namespace) -> int | None:
    """Bits of --load-4bit and --load-8bit; raises OptionError for both, or without bitsandbytes."""
    exclude(args, "load_4bit", "load_8bit")
    if args.load_4bit or args.load_8bit:
        need("quantized", "bitsandbytes")
    return 4 if args.load_4bit else 8 if args.load_8bit else None


def add_budgets(parser: Any, default: str) -> None:
    """Add --r-max and --num-tokens as lists; `default` is said in the help."""
    parser.add_argument("--r-max", metavar="R,R", help=f"budgets, {default} by default")
    parser.add_argument("--num-tokens", metavar="N,N", help="instead: patches of an image in total")


def add_tuned(parser: Any) -> None:
    """Add --prune-from to a command that compares several."""
    parser.add_argument(
        "--prune-from", metavar="FILE", help="what `llava-hvp tune` found, beside the methods named"
    )


def tuned_of(args: argparse.Namespace) -> PruningConfig | None:
    """What --prune-from names; raises OptionError."""
    return None if args.prune_from is None else load_method(args.prune_from)


def budgets(args: argparse.Namespace, default: str | None) -> list[dict[str, float | int]]:
    """One keyword for each budget that was asked for; raises OptionError.

    Parameters
    ----------
    default : str | None
        values of r_max where none was; None leaves each method its own
    """
    exclude(args, "r_max", "num_tokens")
    if args.num_tokens:
        return [{"num_tokens": n} for n in listed(args.num_tokens, int, "--num-tokens")]
    r_max = args.r_max or default
    return [{"r_max": r} for r in listed(r_max, float, "--r-max")] if r_max else [{}]


def listed(text: str, kind: Callable[[str], Value], flag: str) -> list[Value]:
    """The parts of a list separated by commas, each once; raises OptionError."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise OptionError(f"{flag} {text}: give numbers separated by commas") from None


def whole(text: str) -> int:
    """A whole number of at least 1; raises ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def device_of(text: str | None) -> str:
    """The device asked for, or CUDA where there is one; raises OptionError if it cannot be had."""
    device = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device}: {reason}; give cuda or cpu") from error
    return device


def check_folder(path: Path | None) -> None:
    """Raise OptionError where results cannot go into a folder of this name."""
    if path is not None and path.exists() and not path.is_dir():
        raise OptionError(f"--out {path}: that is a file, give a folder")


def weights_of(shipped: str, path: str | Path | None, base: str | Path | None = None) -> Digests:
    """What tells the weights of two checkpoints apart.

    Parameters
    ----------
    shipped : str
        name of a shipped checkpoint, where `path` is None
    """
    if path is not None:
        return digests_of(str(path), None if base is None else str(base))
    tower = digests_of(str(SHIPPED / TOWER), None)[MODEL]
    return {**digests_of(str(SHIPPED / shipped), None), VISION_TOWER: tower}


class Bar:
    """A progress bar on stderr."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def named(self, what: str) -> None:
        """One more is done, and this is what it was."""
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()

    def more(self, count: int) -> None:
        """So many more are done."""
        self._bar.update(count)


@contextlib.contextmanager
def progress(total: int, name: str, unit: str) -> Iterator[Bar]:
    """A bar for the block; it goes away at the end."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=unit, leave=False) as bar:
        yield Bar(bar)


def write_results(
    base: Path,
    content: dict[str, Any],
    table: str,
    draw: Callable[[BinaryIO], None] | None,
) -> None:
    """Write `base`.json, .md and, where there is something to draw, .png, each as a whole."""
    files = {"json": (json.dumps(content, indent=1) + "\n").encode(), "md": table.encode()}
    if draw is not None:
        picture = io.BytesIO()
        draw(picture)
        files["png"] = picture.getvalue()
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix, data in files.items():
        write_whole(base.with_name(f"{base.name}.{suffix}"), data)
    say(f"wrote {base}: {', '.join(f'.{suffix}' for suffix in files)}")
