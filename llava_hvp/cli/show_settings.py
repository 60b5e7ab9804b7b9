"""What `llava-hvp show` draws: its flags as settings, checked with nothing loaded."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from llava_hvp import config
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.variants import Variant, name_of, variants
from llava_hvp.cli.arguments import (
    at_least,
    bits_of,
    budgets,
    device_of,
    exclude,
    listed,
    tuned_of,
)
from llava_hvp.errors import OptionError
from llava_hvp.runtime import BUDGET, INSIDE

BUDGETS = "0.9,0.75,0.67,0.5,0.4,0.33,0.25,0.16,0.11,0.05"  # of a page


@dataclass(frozen=True)
class ShowSettings:
    """What `llava-hvp show` draws of which picture, and where to.

    Parameters
    ----------
    bits : int | None
        4 or 8 to quantise
    conv_mode : str | None
        LLaVA's conversation template; None for what fits the checkpoint's name
    columns : tuple[tuple[Variant, ...], ...]
        for each method its budgets, none being one of its own
    out : Path | None
        a PNG of heat maps where `draws_layers`, else of what is kept
    html : Path | None
        a page with both
    layers : tuple[int, ...] | None
        of the heat maps; None for all
    scale : str
        of their colours, own or shared
    prompt : str | None
        None where none was given
    new_tokens : int
        of an answer
    """

    model_path: str
    model_base: str | None
    conv_mode: str | None
    device: str
    bits: int | None
    image_file: str
    columns: tuple[tuple[Variant, ...], ...]
    out: Path | None
    html: Path | None
    draws_layers: bool
    layers: tuple[int, ...] | None
    scale: str
    prompt: str | None
    new_tokens: int

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All of them, method by method."""
        return tuple(variant for budgets in self.columns for variant in budgets)

    @property
    def tiling(self) -> str:
        """Of all of them."""
        return self.variants[0].runtime.tiling


def parse(args: argparse.Namespace) -> ShowSettings:
    """The settings; raises OptionError or LayerError for what is wrong, with nothing loaded."""
    if not args.out and not args.html:
        raise OptionError("nothing to write: give -o FILE.png, --html FILE.html, or both")
    _check_writable(args.out, ".png")
    _check_writable(args.html, ".html", ".htm")
    for one in ("prune_from", "prune_method"):
        exclude(args, one, "methods")
    for more in ("prune_method", "r_max", "num_tokens", "prune_opt", "prune_inside"):
        exclude(args, "prune_from", more)
    exclude(args, "r_max", "num_tokens")
    bits = bits_of(args)
    at_least(args, "new_tokens", 1)
    if args.out and _names_methods(args) == bool(args.layers):
        raise OptionError(
            "-o draws one thing: give --prune-method, --methods or --prune-from for what is kept, "
            "or --layers for heat maps (--html shows both)"
        )
    layers = None if args.layers in (None, "all") else listed(args.layers, int, "--layers")
    settings = ShowSettings(
        model_path=args.model_path,
        model_base=args.model_base,
        conv_mode=args.conv_mode,
        device=device_of(args.device),
        bits=bits,
        image_file=args.image_file,
        columns=_columns(args),
        out=args.out,
        html=args.html,
        draws_layers=bool(args.layers),
        layers=None if layers is None else tuple(layers),
        scale=args.scale,
        prompt=args.prompt or None,
        new_tokens=args.new_tokens,
    )
    check_before_loading(settings.model_path, [v.pruning for v in settings.variants])
    return settings


def _names_methods(args: argparse.Namespace) -> bool:
    return bool(args.prune_method or args.methods or args.prune_from)


def _check_writable(path: Path | None, *suffixes: str) -> None:
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"{path}: give a name that ends in {suffixes[0]}")
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"{path}: give a file in a folder that is there")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{path}: may not be written: give another place")


def _columns(args: argparse.Namespace) -> tuple[tuple[Variant, ...], ...]:
    """For each method its budgets."""
    if args.prune_from:
        return ((Variant(tuned_of(args)),),)
    names = [args.prune_method] if args.prune_method else (args.methods or "").split(",")
    if not any(names):
        names = ["hivtp", "hiprune", *(["hiprune++"] if args.prompt else [])]
    options = args.prune_opt or ()
    if args.prune_inside or any(getattr(args, INSIDE + name) for name in (*BUDGET, "opt")):
        return (_pairs(args),)
    try:
        chosen = variants(names, budgets(args, BUDGETS if args.html else None), options)
    except OptionError:
        if args.r_max or args.num_tokens:
            raise
        # Options may be a budget of their own, as hivtp's k is.
        chosen = variants(names, [{}], options)
    columns = dict.fromkeys(name_of(name) for name in names)
    return tuple(tuple(v for v in chosen if v.name == name) for name in columns)


def _pairs(args: argparse.Namespace) -> tuple[Variant, ...]:
    """The --prune-method at each of its budgets, with the --prune-inside behind it."""
    found: list[Variant] = []
    unset = {"r_max": None, "num_tokens": None, "prune_train": False, "prune_tower": None}
    unset["train_r_max"] = None
    for budget in budgets(args, None):
        given = argparse.Namespace(**{**vars(args), **unset} | budget)
        found.append(Variant(config.requested(given).pruning))
    return tuple(found)
