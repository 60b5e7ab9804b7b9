"""The flags and the variable LLAVA_HVP: two ways to write what a command is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods, method_class, method_spec
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.options import read_option, unpruned
from llava_hvp.runtime import (
    BUDGET,
    INSIDE,
    JOINED,
    PruningConfig,
    method_classes,
)
from llava_hvp.tuned import load_method

VARIABLE = "LLAVA_HVP"
DEVICE_VARIABLE = "LLAVA_HVP_DEVICE"
DISABLE_VARIABLE = "LLAVA_HVP_DISABLE"
# Flags, as attributes, that say more of a --prune-method.
_REFINE = (*BUDGET, "prune_opt", "prune_inside", *(INSIDE + n for n in (*BUDGET, "opt")))


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
    train_r_max : tuple[float, ...]
        budgets that training goes through in turns, of which `pruning` has the smallest; empty
        where it has the one
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
    train_r_max: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.train and self.pruning is not None and self.pruning.inside is not None:
            raise OptionError(
                f"--prune-train: {self.pruning.inside.name} prunes inside the language model, "
                "which training does not go with: leave one of them out"
            )

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
        "--prune-inside",
        metavar="NAME",
        help="a second method, which prunes inside the language model what the first one sends; "
        "alone it is the --prune-method",
    )
    group.add_argument(
        "--inside-r-max",
        type=_number,
        metavar="R",
        help="its budget: upper bound on visual tokens, averaged over the layers, of those that it "
        "gets; 0.5 where none is given",
    )
    group.add_argument(
        "--inside-num-tokens",
        type=_integer,
        metavar="N",
        help="instead: that average as visual tokens of one image",
    )
    group.add_argument(
        "--inside-opt", action="append", metavar="KEY=VALUE", help="an option of it, repeatable"
    )
    group.add_argument(
        "--prune-from",
        metavar="FILE",
        help="instead of all these: what `llava-hvp tune` found, on the vision tower that it was "
        "found on",
    )
    group.add_argument("--prune-tower", metavar="HASH", help=argparse.SUPPRESS)
    group.add_argument(
        "--prune-train",
        action="store_true",
        help="prune in training too (llava.train only)" if train else argparse.SUPPRESS,
    )
    group.add_argument(
        "--train-r-max",
        type=_numbers,
        metavar="R,R,…",
        help="with --prune-train instead of --r-max: a step of the training has one of these, all "
        "of them in turns; 1 is unpruned"
        if train
        else argparse.SUPPRESS,
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
    device = getattr(found, "device", None)
    reports, part = (getattr(found, f"prune_{n}", None) for n in ("reports", "part"))
    if found.prune_from is not None:
        tuned = load_method(found.prune_from)
        _refuse_beside(found, tuned)
        return Request(tuned, found.prune_train, device, reports, part)
    if found.prune_method is None:
        _refuse_lonely(found)
        return Request(device=device, reports=reports, part=part)
    if found.prune_inside is not None:
        check_pair(found.prune_method, found.prune_inside)
    if found.train_r_max is not None and not found.prune_train:
        raise OptionError("--train-r-max without --prune-train: it is for training, give both")
    if found.prune_method == NONE:
        if found.train_r_max is not None:
            raise OptionError("--train-r-max beside --prune-method none: name a method")
        none = unpruned(_given(found, NONE))
        return Request(none, found.prune_train, device, reports, part, unpruned=none is None)
    if found.prune_inside is None and len(method_classes(found.prune_method)) > 1:
        first, second = map(method_spec, method_classes(found.prune_method))
        raise OptionError(
            f"--prune-method {shown(found.prune_method)}: give --prune-method {first} "
            f"--prune-inside {second}, each with a budget of its own"
        )
    spec = JOINED.join(filter(None, (found.prune_method, found.prune_inside)))
    given, turns = _given(found, spec), found.train_r_max or ()
    for name in (name for name in BUDGET if turns and name in given):
        raise OptionError(f"--train-r-max beside {_flag(name)}: give one of them")
    budgets = [{"r_max": r_max} for r_max in sorted(turns, reverse=True)] or [{}]
    # Each is checked, and the smallest stays.
    pruning = [PruningConfig.of(spec, **given, **budget) for budget in budgets][-1]
    pruning = dataclasses.replace(pruning, tower=found.prune_tower)
    return Request(pruning, found.prune_train, device, reports, part, train_r_max=turns)


def _refuse_beside(found: argparse.Namespace, tuned: PruningConfig) -> None:
    """Raise OptionError for flags that would change what was tuned."""
    names = ["prune_method", "prune_tower", "train_r_max", *_REFINE]
    beside = [name for name in names if getattr(found, name) is not None]
    if beside:
        raise OptionError(
            f"--prune-from {found.prune_from} and {_flag(beside[0])} exclude each other: to change "
            f"what was tuned, write it out: {' '.join(to_flags(Request(tuned)))}"
        )


def _refuse_lonely(found: argparse.Namespace) -> None:
    """Raise OptionError for flags that say nothing without a method."""
    names = (*_REFINE, "prune_tower", "train_r_max")
    lonely = [name for name in names if getattr(found, name) is not None]
    lonely += ["prune_train"] * found.prune_train
    if lonely and found.prune_inside is not None:
        raise OptionError(
            f"--prune-inside {shown(found.prune_inside)} without --prune-method: give it as "
            "--prune-method, or one at the vision tower beside it"
        )
    if lonely:
        raise OptionError(f"{_flag(lonely[0])} without --prune-method: give one of {_names()}")


def check_pair(first: str, second: str) -> None:
    """Raise OptionError for two methods of which not the second alone prunes inside."""
    if NONE in (first, second):
        raise OptionError(
            f"prune-inside {shown(second)} beside prune-method {shown(first)}: give a method alone "
            "as prune-method"
        )
    kinds = method_classes(first)
    if len(kinds) > 1 or issubclass(kinds[0], LanguageMethod):
        raise OptionError(
            f"prune-inside {shown(second)}: prune-method {shown(first)} prunes inside the "
            "language model already: give one of them"
        )
    if not issubclass(method_class(second), LanguageMethod):
        raise OptionError(
            f"prune-inside {shown(second)}: that prunes at the vision tower: inside the language "
            f"model prune {', '.join(list_methods(LanguageMethod))}"
        )


def _given(found: argparse.Namespace, spec: str) -> dict[str, Any]:
    """Options of one method or two by their flags; raises OptionError for one given twice."""
    budgets = [*BUDGET, *(INSIDE + name for name in BUDGET)]
    given = {n: getattr(found, n) for n in budgets if getattr(found, n) is not None}
    second = [INSIDE + text for text in found.inside_opt or ()]
    if spec == NONE or len(method_classes(spec)) == 1:
        lonely = [n for n in given if n.startswith(INSIDE)] + [f"{INSIDE}opt"] * bool(second)
        if lonely:
            raise OptionError(
                f"{_flag(lonely[0])} without --prune-inside: an only method takes "
                f"{_flag(lonely[0].removeprefix(INSIDE)).replace('--opt', '--prune-opt')}"
            )
    for text in (*(found.prune_opt or ()), *second):
        key, value = read_option(spec, text)
        if key in given:
            raise OptionError(f"{key} is given twice: {shown(given[key])} and {shown(value)}")
        given[key] = value
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
    """Whether the startup hook sleeps whatever is asked; it has the same rule, without us."""
    return environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


def to_flags(request: Request) -> list[str]:
    """Flags that `parse` reads back as an equal request."""
    flags: list[str] = []
    if request.pruning is not None:
        first, *second = (method_spec(type(method)) for method in request.pruning.methods)
        flags += ["--prune-method", first]
        for name in second:
            flags += ["--prune-inside", name]
        for name, value in request.pruning.given.items():
            own = name.removeprefix(INSIDE) if second else name
            if request.train_r_max and name == "r_max":
                turns = ",".join(map(str, request.train_r_max))
                flags += ["--train-r-max", turns]
            elif own in BUDGET:
                flags += [_flag(name), str(value)]
            else:
                kind = "--prune-opt" if own == name else "--inside-opt"
                flags += [kind, f"{own}={value}"]
        flags += [] if request.pruning.tower is None else ["--prune-tower", request.pruning.tower]
    elif request.unpruned:
        flags += ["--prune-method", NONE]
    flags += ["--prune-train"] * request.train
    hidden = {"--prune-reports": request.reports, "--prune-part": request.part}
    for flag, text in {"--device": request.device, **hidden}.items():
        flags += [flag, text] if text else []
    return flags


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no number: give one in (0, 1]"
        ) from None


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(_number, text.split(",")))


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number") from None
