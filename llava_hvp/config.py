"""The flags and the variable LLAVA_HVP: two ways to write what a command is asked for."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods, method_class, method_spec
from llava_hvp.methods.base import VisionMethod
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import BUDGET, RUNTIME_OPTIONS, PruningConfig, Runtime, options_of

VARIABLE = "LLAVA_HVP"
DEVICE_VARIABLE = "LLAVA_HVP_DEVICE"
DISABLE_VARIABLE = "LLAVA_HVP_DISABLE"
LONGEST_VALUE = 1000  # characters; 60 layers are 200


@dataclass(frozen=True)
class Request:
    """What a command was asked to do.

    Parameters
    ----------
    pruning : PruningConfig | None
        the method and how to run it; None to leave pruning off
    unpruned : bool
        `none` was asked for: LLaVA without us, bridged to this transformers, with an account of it;
        False where nothing was asked, and where `none` has a tiling or packing of its own
    train : bool
        prune in training too
    device : str | None
        "cpu" to run commands that insist on CUDA on the CPU; None leaves them as they are
    reports : str | None
        folder in which each process leaves what became of it, for the launcher
    part : str | None
        an eval script answers a part of a benchmark for `llava-hvp eval`: what the names of the
        files begin with that pass between the two
    """

    pruning: PruningConfig | None = None
    train: bool = False
    device: str | None = None
    reports: str | None = None
    part: str | None = None
    unpruned: bool = False

    @property
    def method(self) -> VisionMethod | None:
        """The method; None to leave pruning off."""
        return None if self.pruning is None else self.pruning.method

    @property
    def asked(self) -> bool:
        """Whether a method was named, or `none`."""
        return self.pruning is not None or self.unpruned


class _Parser(argparse.ArgumentParser):
    """Knows our flags only, says what is wrong in one line, and leaves the exit to others."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message if len(message) <= 300 else f"{message[:300]}…")


def parser() -> argparse.ArgumentParser:
    """An empty parser that takes no abbreviations and raises OptionError for what is wrong."""
    return _Parser(add_help=False, allow_abbrev=False)


def add_flags(parser: argparse.ArgumentParser, *, device: bool, train: bool = False) -> None:
    """Add our flags to a parser, for its help and for parsing.

    Parameters
    ----------
    device : bool
        with --device, for commands that have none of their own
    train : bool
        with --prune-train in the help, for commands that may train
    """
    group = parser.add_argument_group("visual token pruning (llava-hvp)")
    group.add_argument("--prune-method", metavar="NAME", help=f"one of {_names()}")
    group.add_argument(
        "--r-max",
        type=_number,
        metavar="R",
        help="upper bound on kept / all patches, in (0, 1], rounded to whole patches, at least one "
        "(0.3 of 576 is 173); 0.5 where no budget is given",
    )
    group.add_argument(
        "--num-tokens", type=_integer, metavar="N", help="instead: patches of one image in total"
    )
    group.add_argument(
        "--prune-opt",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the method, repeatable; `llava-hvp methods` lists them",
    )
    group.add_argument(
        "--prune-train",
        action="store_true",
        help="prune in training too (llava.train only)" if train else argparse.SUPPRESS,
    )
    if device:
        group.add_argument(
            "--device", choices=("cuda", "cpu"), help="cpu: run without CUDA, slowly"
        )


def parse(arguments: Sequence[str], *, device: bool) -> tuple[Request, list[str]]:
    """Our flags of a command line, and the arguments that are not ours.

    Raises OptionError, which names the value and what would be right.
    """
    ours = parser()
    add_flags(ours, device=device)
    ours.add_argument("--prune-reports", help=argparse.SUPPRESS)
    ours.add_argument("--prune-part", help=argparse.SUPPRESS)
    found, rest = ours.parse_known_args(list(arguments))
    return requested(found), rest


def requested(found: argparse.Namespace) -> Request:
    """What the flags of `add_flags` ask for, once parsed; raises OptionError."""
    given = {n: getattr(found, n) for n in BUDGET if getattr(found, n) is not None}
    device = getattr(found, "device", None)
    reports, part = (getattr(found, f"prune_{n}", None) for n in ("reports", "part"))
    if found.prune_method is None:
        lonely = [f"--{name.replace('_', '-')}" for name in given]
        lonely += ["--prune-opt"] * bool(found.prune_opt) + ["--prune-train"] * found.prune_train
        if lonely:
            raise OptionError(f"{lonely[0]} without --prune-method: give one of {_names()}")
        return Request(device=device, reports=reports, part=part)
    if found.prune_method == NONE:
        options = dict(read_option(NONE, text) for text in found.prune_opt or ())
        none = unpruned(options | given)
        return Request(none, found.prune_train, device, reports, part, unpruned=none is None)
    for text in found.prune_opt or ():
        key, value = read_option(found.prune_method, text)
        if key in given:
            raise OptionError(f"{key} is given twice: {shown(given[key])} and {shown(value)}")
        given[key] = value
    pruning = PruningConfig.of(found.prune_method, **given)
    return Request(pruning, found.prune_train, device, reports, part)


def unpruned(options: Mapping[str, Any]) -> PruningConfig | None:
    """What `none` is beside these options: None for LLaVA without us.

    By a tiling or packing of its own LLaVA is unpruned in that protocol, as its pruned neighbours
    in a loop over methods are. The other options are taken and not used. Raises OptionError for
    options that no method has, or a wrong value of a budget or a Runtime.
    """
    kinds = [method_class(name) for name in list_methods()]
    known = {option for kind in kinds for option in options_of(kind)}
    for option in options:
        if option not in known:
            raise OptionError(f"{NONE}: unknown option {option!r}: no method has it")
    Unpruned(**{name: value for name, value in options.items() if name in BUDGET})
    given = Runtime(**{name: options[name] for name in RUNTIME_OPTIONS if name in options})
    if given.tiling == "stock" and given.packs_as_stock:
        return None
    own = Runtime(tiling=given.tiling, patch_merge=given.patch_merge, newline=given.newline)
    return PruningConfig(Unpruned(), own)


def _names() -> str:
    return ", ".join((*list_methods(), NONE))


def from_environment(environ: Mapping[str, str]) -> Request:
    """What LLAVA_HVP and LLAVA_HVP_DEVICE ask for."""
    request = Request()
    text = environ.get(VARIABLE, "")
    if text.strip():
        try:
            request, rest = parse(shlex.split(text), device=True)
        except ValueError as error:  # ours, or shlex on an open quote
            raise OptionError(f"{VARIABLE}={shown(text)}: {error}") from error
        if rest:
            raise OptionError(
                f"{VARIABLE}={shown(text)}: unknown {shown(rest[0])}: give flags, as in "
                f"{VARIABLE}='--prune-method hivtp --r-max 0.5'"
            )
    device = environ.get(DEVICE_VARIABLE) or request.device
    if device not in (None, "cpu", "cuda"):
        raise OptionError(f"{DEVICE_VARIABLE}={shown(device)}: give cpu or cuda")
    return dataclasses.replace(request, device=device)


def switched_off(environ: Mapping[str, str]) -> bool:
    """Whether the startup hook sleeps whatever is asked; it has the same rule, without torch."""
    return environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


def to_flags(request: Request) -> list[str]:
    """Flags that `parse` reads back as an equal request."""
    flags: list[str] = []
    if request.pruning is not None:
        flags += ["--prune-method", method_spec(type(request.pruning.method))]
        for name, value in request.pruning.given.items():
            if name in BUDGET:
                flags += [f"--{name.replace('_', '-')}", str(value)]
            else:
                flags += ["--prune-opt", f"{name}={value}"]
    elif request.unpruned:
        flags += ["--prune-method", NONE]
    flags += ["--prune-train"] * request.train
    hidden = {"--prune-reports": request.reports, "--prune-part": request.part}
    for flag, text in {"--device": request.device, **hidden}.items():
        flags += [flag, text] if text else []
    return flags


def read_option(method: str, text: str) -> tuple[str, Any]:
    """Name and value of KEY=VALUE, of the method or its Runtime; raises OptionError."""
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise OptionError(f"--prune-opt {shown(text)}: give KEY=VALUE, as patch_merge=spatial")
    if len(value) > LONGEST_VALUE:
        raise OptionError(
            f"--prune-opt {shown(text)}: give a value of at most {LONGEST_VALUE} characters"
        )
    kind = Unpruned if method == NONE else method_class(method)
    kinds = {f.name: str(f.type) for each in (kind, Runtime) for f in dataclasses.fields(each)}
    return key, _value(value.strip(), kinds.get(key, ""))


def _value(text: str, kind: str) -> Any:
    """A Python literal where it is one (numbers, None, `7,8,9`), else the text itself.

    Parameters
    ----------
    kind : str
        the option's annotation, since "none" is a word to some and None to others
    """
    if kind == "str":  # one of some words, of which a number may be one
        return text
    known = {"true": True, "false": False} | ({"none": None} if "None" in kind else {})
    if text.lower() in known:
        return known[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # the last three of a dict of lists, and of deep nesting
    is_one = not isinstance(value, (tuple, list))
    return (value,) if is_one and value is not None and "tuple" in kind else value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no number: give one in (0, 1]"
        ) from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number") from None
