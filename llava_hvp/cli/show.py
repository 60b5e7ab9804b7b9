"""`llava-hvp show`: which patches stay, and what the encoder's layers attend to, as pictures."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.variants import NONE, Variant, name_of, variants
from llava_hvp.cli.arguments import at_least, bits_of, device_of, exclude, listed
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.files import write_whole
from llava_hvp.methods import list_methods, method_class

BUDGETS = "0.9,0.75,0.67,0.5,0.4,0.33,0.25,0.16,0.11,0.05"  # of a page
QUESTION = "What is in the picture?"  # where none is asked; methods that read it insist on one
CELL = 520  # pixels, the width of a picture in a grid of several


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "show", help="draw which patches stay, and attention by layer", allow_abbrev=False
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument("--model-path", required=True, help="a LLaVA checkpoint")
    what.add_argument("--model-base", help="as LLaVA's commands take it")
    what.add_argument("--image-file", required=True, help="a path or an address, as LLaVA takes it")
    names = ", ".join((NONE, *list_methods()))
    what.add_argument("--prune-method", metavar="NAME", help=f"one of {names}")
    what.add_argument("--methods", metavar="NAME,NAME", help="instead: several, for a grid")
    what.add_argument("--r-max", metavar="R,R", help="budgets; 0.5 by default, ten on a page")
    what.add_argument("--num-tokens", metavar="N,N", help="instead: patches of one image in total")
    what.add_argument(
        "--prune-opt",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the methods that have it, repeatable",
    )
    what.add_argument(
        "--layers", metavar="all|N,N", help="heat maps of the attention that patches receive"
    )
    what.add_argument(
        "--scale", choices=("own", "shared"), default="own", help="of the colours of heat maps"
    )
    what.add_argument("--prompt", help="for methods that read it, and for the answers on a page")
    what.add_argument(
        "--conv-mode", help="LLaVA's conversation template; by default what fits the name"
    )
    what.add_argument("--new-tokens", type=int, default=64, help="of an answer, 64 by default")
    where = parser.add_argument_group("where it goes and runs")
    where.add_argument("-o", "--out", type=Path, metavar="FILE.png")
    where.add_argument("--html", type=Path, metavar="FILE.html", help="a page to look through")
    where.add_argument("--device", help="cuda where there is one, else cpu")
    where.add_argument("--load-4bit", action="store_true")
    where.add_argument("--load-8bit", action="store_true")
    parser.set_defaults(main=main)


def main(found: argparse.Namespace) -> int:
    """Draw and write; the exit code."""
    shown, layers = _check(found)
    asked = [v.method for budgets in shown for v in budgets if v.method is not None]
    check_before_loading(found.model_path, asked)
    from llava_hvp.show.pictures import open_picture

    image, notes = open_picture(found.image_file)
    # LLaVA and the model come only now: whatever was typed wrong has been said.
    from llava_hvp.checkpoints.viewer import Viewer

    viewer = Viewer.load(
        found.model_path,
        found.model_base,
        found.device,
        bits=found.bits,
        conv_mode=found.conv_mode,
    )
    for variant in (variant for budgets in shown for variant in budgets):
        if viewer.reads(variant.method).relevance and not found.prompt:
            raise OptionError(f"{variant.name} reads the prompt: give --prompt")
    ids = viewer.prompt(found.prompt or QUESTION)
    files: dict[Path, bytes] = {}
    if found.out and found.layers:
        files[found.out] = _png(_heat_maps(viewer, image, layers, found, notes))
    elif found.out:
        files[found.out] = _png(_overlays(viewer, image, shown, ids, found, notes))
    if found.html:
        page = _page(viewer, image, shown, layers, ids, found, notes)
        files[found.html] = page.encode()
    for path, content in files.items():
        try:
            write_whole(path, content)
        except OSError as error:
            raise OptionError(f"{path}: cannot be written: {error}") from error
        say(f"wrote {path}")
    return 0


def _check(found: argparse.Namespace) -> tuple[list[list[Variant]], tuple[int, ...] | None]:
    """Methods at their budgets, and layers (None for all); OptionError for what is wrong."""
    if not found.out and not found.html:
        raise OptionError("nothing to write: give -o FILE.png, --html FILE.html, or both")
    for path, suffixes in ((found.out, (".png",)), (found.html, (".html", ".htm"))):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise OptionError(f"{path}: give a name that ends in {suffixes[0]}")
        if path.is_dir() or not path.parent.is_dir():
            raise OptionError(f"{path}: give a file in a folder that is there")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OptionError(f"{path}: may not be written: give another place")
    exclude(found, "prune_method", "methods")
    exclude(found, "r_max", "num_tokens")
    found.bits = bits_of(found)
    at_least(found, "new_tokens", 1)
    names = found.prune_method or found.methods
    if found.out and bool(names) == bool(found.layers):
        raise OptionError(
            "-o draws one thing: give --prune-method or --methods for what is kept, or --layers "
            "for heat maps (--html shows both)"
        )
    found.device = device_of(found.device)
    layers = None if found.layers in (None, "all") else listed(found.layers, int, "--layers")
    return _methods(found), None if layers is None else tuple(layers)


def _methods(found: argparse.Namespace) -> list[list[Variant]]:
    """For each method its budgets, none being one of its own."""
    budgets: list[dict[str, float | int]]
    names = [found.prune_method] if found.prune_method else (found.methods or "").split(",")
    if not any(names):
        names = ["hivtp", "hiprune", *(["hiprune++"] if found.prompt else [])]
    if found.num_tokens:
        budgets = [{"num_tokens": n} for n in listed(found.num_tokens, int, "--num-tokens")]
    elif found.r_max or found.html:
        budgets = [{"r_max": r} for r in listed(found.r_max or BUDGETS, float, "--r-max")]
    else:
        budgets = [{}]
    try:
        chosen = variants(names, budgets, found.prune_opt or ())
    except OptionError:
        if found.r_max or found.num_tokens:
            raise
        # Options may be a budget of their own, as hivtp's k is.
        chosen = variants(names, [{}], found.prune_opt or ())
    return [[v for v in chosen if v.name == name] for name in dict.fromkeys(map(name_of, names))]


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _heat_maps(viewer: Any, image: Any, layers: Any, found: Any, notes: list[str]) -> Any:
    from llava_hvp.show.heatmap import heat_maps

    title = " ".join([f"{Path(found.image_file).name}, {viewer.name}.", *notes])
    received = viewer.received_attention(image, layers)
    return heat_maps(viewer.view.frame(image), received, scale=found.scale, title=title)


def _overlays(
    viewer: Any, image: Any, shown: list[list[Variant]], ids: Any, found: Any, notes: list[str]
) -> Any:
    """One overlay, or a grid of them: a column a method, a row a budget, none in every row."""
    from llava_hvp.show.overlay import grid, overlay

    several = sum(map(len, shown)) > 1
    kwargs = {"widest": CELL} if several else {"notes": notes}
    columns = [
        [
            overlay(viewer.look(v.pruning, image, ids), image, title=str(v), **kwargs)
            for v in budgets
        ]
        for budgets in shown
    ]
    if not several:
        return columns[0][0]
    title = " ".join([f"{Path(found.image_file).name}, {viewer.name}.", *notes])
    rows = max(map(len, columns))
    columns = [cells * (rows // len(cells)) for cells in columns]
    return grid(list(zip(*columns, strict=True)), title)


def _page(
    viewer: Any,
    image: Any,
    chosen: list[list[Variant]],
    layers: Any,
    ids: Any,
    found: Any,
    notes: list[str],
) -> str:
    from llava_hvp.show.page import MethodShown, Page, Shown

    received = viewer.received_attention(image, layers)
    unpruned = viewer.answer(None, image, ids, found.new_tokens)[0] if found.prompt else ""

    def shown(variant: Variant) -> Shown:
        pruning = variant.pruning
        if pruning is None:
            return Shown("everything kept", viewer.look(None, image, ids), unpruned)
        label = variant.options.replace("=", " ") or "no budget"
        if found.prompt:
            answer, report = viewer.answer(pruning, image, ids, found.new_tokens)
            return Shown(label, report, answer)
        return Shown(label, viewer.look(pruning, image, ids))

    return Page(
        title=Path(found.image_file).name,
        model=viewer.name,
        panels=viewer.view.frame(image),
        methods=[
            MethodShown(
                budgets[0].name,
                "LLaVA without pruning"
                if budgets[0].method is None
                else method_class(budgets[0].name).summary,
                viewer.reads(budgets[0].method).received_attention,
                [shown(variant) for variant in budgets],
            )
            for budgets in chosen
        ],
        received=received,
        notes=[viewer.view.describe(image.size), *notes],
        prompt=found.prompt or "",
        unpruned=unpruned,
    ).render()
