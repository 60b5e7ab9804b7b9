"""`llava-hvp show`: which patches stay, and what the encoder's layers attend to, as pictures."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp import config
from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.variants import NONE, Variant, name_of, variants
from llava_hvp.cli.arguments import (
    at_least,
    bits_of,
    budgets,
    device_of,
    exclude,
    listed,
    tuned_of,
)
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.files import write_whole
from llava_hvp.methods import list_methods
from llava_hvp.runtime import BUDGET, INSIDE

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_hvp.checkpoints.viewer import Viewer
    from llava_hvp.pruning.report import ImageReport
    from llava_hvp.show.page import MethodShown, Shown

BUDGETS = "0.9,0.75,0.67,0.5,0.4,0.33,0.25,0.16,0.11,0.05"  # of a page
QUESTION = "What is in the picture?"  # where none is asked; methods that read it insist on one
CELL = 520  # pixels, the width of a picture in a grid of several

EXAMPLES = (
    "llava-hvp show --model-path shapes/llava-shapes --image-file "
    "shapes/llava-shapes/pictures/1.png --prune-method hivtp --r-max 0.25 --prompt "
    "'Is there a red circle?' -o kept.png",
    "llava-hvp show --model-path shapes/llava-shapes --image-file "
    "shapes/llava-shapes/pictures/1.png --methods hivtp,hiprune --r-max 0.5,0.25 "
    "--html page.html",
    "llava-hvp show --model-path shapes/llava-shapes --image-file "
    "shapes/llava-shapes/pictures/1.png --layers 4,6,9 -o layers.png",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "show",
        "draw which patches stay, and attention by layer",
        "A PNG by -o: the picture, what is kept of it in its own colours, and with "
        "--prompt both answers. A page by --html, with a slider for the budget.",
        EXAMPLES,
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument("--model-path", required=True, help="a LLaVA checkpoint")
    what.add_argument("--model-base", help="as LLaVA's commands take it")
    what.add_argument("--image-file", required=True, help="a path or an address, as LLaVA takes it")
    names = ", ".join((NONE, *list_methods()))
    what.add_argument("--prune-method", metavar="NAME", help=f"one of {names}")
    what.add_argument("--methods", metavar="NAME,NAME", help="instead: several, for a grid")
    what.add_argument("--prune-from", metavar="FILE", help="instead: what `llava-hvp tune` found")
    what.add_argument("--r-max", metavar="R,R", help="budgets; 0.5 by default, ten on a page")
    what.add_argument("--num-tokens", metavar="N,N", help="instead: patches of one image in total")
    what.add_argument(
        "--prune-opt",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the methods that have it, repeatable",
    )
    what.add_argument(
        "--prune-inside", metavar="NAME", help="with --prune-method: inside the language model"
    )
    what.add_argument("--inside-r-max", metavar="R", type=float, help="its budget")
    what.add_argument("--inside-num-tokens", metavar="N", type=int, help="instead of that")
    what.add_argument("--inside-opt", action="append", metavar="KEY=VALUE")
    what.add_argument(
        "--layers", metavar="all|N,N", help="heat maps of the attention that patches receive"
    )
    what.add_argument(
        "--scale", choices=("own", "shared"), default="own", help="of the colours of heat maps"
    )
    what.add_argument(
        "--prompt",
        help="a question: both answers, unpruned and pruned, are written below the pictures; "
        "methods that read it need it",
    )
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


def run(settings: ShowSettings) -> int:
    """Draw and write; the exit code."""
    from llava_hvp.show.pictures import open_picture

    image, notes = open_picture(settings.image_file)
    # LLaVA and the model come only now: whatever was typed wrong has been said.
    from llava_hvp.checkpoints.viewer import Viewer

    viewer = Viewer.load(
        settings.model_path,
        settings.model_base,
        settings.device,
        bits=settings.bits,
        conv_mode=settings.conv_mode,
        tiling=settings.tiling,
    )
    for variant in settings.variants:
        if viewer.reads(variant).relevance and not settings.prompt:
            raise OptionError(f"{variant.name} reads the prompt: give --prompt")
    drawing = _Drawing(settings, viewer, image, notes)
    files: dict[Path, bytes] = {}
    if settings.out:
        sheet = drawing.heat_maps() if settings.draws_layers else drawing.overlays()
        files[settings.out] = _png(sheet)
    if settings.html:
        files[settings.html] = drawing.page().encode()
    for path, content in files.items():
        try:
            write_whole(path, content)
        except OSError as error:
            raise OptionError(f"{path}: cannot be written: {error}") from error
        say(f"wrote {path}")
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


class _Drawing:
    """One picture as a model sees it, drawn as the settings ask.

    Parameters
    ----------
    notes : list[str]
        on how the picture was read
    """

    def __init__(
        self, settings: ShowSettings, viewer: Viewer, image: Image, notes: list[str]
    ) -> None:
        self.settings, self.viewer, self.image, self.notes = settings, viewer, image, notes
        self.ids = viewer.prompt(settings.prompt or QUESTION)
        self.name = Path(settings.image_file).name
        self.title = " ".join([f"{self.name}, {viewer.name}.", *notes])

    def heat_maps(self) -> Image:
        """The attention that patches receive, a panel a layer."""
        from llava_hvp.show.heatmap import heat_maps

        frame = self.viewer.view.frame(self.image)
        received = self.viewer.received_attention(self.image, self.settings.layers)
        return heat_maps(frame, received, scale=self.settings.scale, title=self.title)

    def overlays(self) -> Image:
        """One overlay, or a grid: a column a method, a row a budget, none in every row."""
        from llava_hvp.show.overlay import (
            NARROWEST,
            captioned,
            grid,
            original_of,
            overlay,
            scale_for,
            titled,
        )

        settings = self.settings
        unpruned = self._answer(Variant())[0] if settings.prompt else None
        if len(settings.variants) == 1:
            (variant,) = settings.variants
            report, answers = self._pruned(variant, unpruned)
            kept = overlay(
                report, self.image, title=str(variant), notes=self.notes, answers=answers
            )
            return titled(kept, settings.prompt or self.title)
        panels = self.viewer.view.frame(self.image)
        columns = [
            [self._cell(variant, unpruned) for variant in column] for column in settings.columns
        ]
        rows = max(map(len, columns))
        columns = [cells * (rows // len(cells)) for cells in columns]
        picture = original_of(self.image, panels, scale_for(panels, CELL))
        told = "unpruned" if settings.prompt else self.viewer.view.describe(self.image.size)
        original = captioned(picture, told, unpruned, least=NARROWEST)
        cells = list(zip(*columns, strict=True))
        return grid(cells, original, settings.prompt or self.title)

    def _cell(self, variant: Variant, unpruned: str | None) -> Image:
        """One picture of a grid."""
        from llava_hvp.show.overlay import overlay

        report, answers = self._pruned(variant, unpruned)
        return overlay(
            report, self.image, title=str(variant), answers=answers, original=False, widest=CELL
        )

    def _pruned(
        self, variant: Variant, unpruned: str | None
    ) -> tuple[ImageReport, tuple[str, str] | None]:
        """What is kept and, where something was asked, both answers."""
        if unpruned is None:
            return self._look(variant), None
        if not variant.prunes:
            return self._look(variant), (unpruned, unpruned)
        answer, report = self._answer(variant)
        return report, (unpruned, answer)

    def page(self) -> str:
        """The HTML page."""
        from llava_hvp.show.page import Page

        viewer, settings = self.viewer, self.settings
        received = viewer.received_attention(self.image, settings.layers)
        unpruned = self._answer(Variant())[0] if settings.prompt else ""
        return Page(
            title=self.name,
            model=viewer.name,
            panels=viewer.view.frame(self.image),
            methods=[self._method(budgets, unpruned) for budgets in settings.columns],
            received=received,
            notes=[viewer.view.describe(self.image.size), *self.notes],
            prompt=settings.prompt or "",
            unpruned=unpruned,
        ).render()

    def _method(self, budgets: Sequence[Variant], unpruned: str) -> MethodShown:
        from llava_hvp.show.page import MethodShown

        first = budgets[0]
        return MethodShown(
            first.name,
            first.summary,
            self.viewer.reads(first).received_attention,
            [shown for variant in budgets for shown in self._budget(variant, unpruned)],
        )

    def _budget(self, variant: Variant, unpruned: str) -> list[Shown]:
        """What stays at a budget: at the tower, and after each stage inside the language model."""
        from llava_hvp.show.inside import shown_of
        from llava_hvp.show.page import Shown

        if not variant.prunes:
            return [Shown("everything kept", self._look(variant), unpruned)]
        label = variant.options.replace("=", " ") or "no budget"
        kept, answer = self._look(variant) if not self.settings.prompt else None, ""
        if kept is None:
            answer, kept = self._answer(variant)
        if not kept.stages:
            return [Shown(label, kept, answer)]
        return [Shown(f"{label}, {words}", r, answer) for words, r in shown_of(kept)]

    def _look(self, variant: Variant) -> ImageReport:
        return self.viewer.look(variant, self.image, self.ids)

    def _answer(self, variant: Variant) -> tuple[str, Any]:
        return self.viewer.answer(variant, self.image, self.ids, self.settings.new_tokens)
