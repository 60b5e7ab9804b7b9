"""`llava-hvp show`: which patches stay, and what the encoder's layers attend to, as pictures."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.variants import NONE
from llava_hvp.cli.parser import add_command
from llava_hvp.cli.show_settings import ShowSettings, parse
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.files import write_whole
from llava_hvp.methods import list_methods

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


def run(settings: ShowSettings) -> int:
    """Draw and write; the exit code."""
    from llava_hvp.show.pictures import open_picture

    image, notes = open_picture(settings.image_file)
    # LLaVA and the model come only now: whatever was typed wrong has been said.
    from llava_hvp.checkpoints.viewer import Viewer
    from llava_hvp.cli.show_drawing import Drawing

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
    drawing = Drawing(settings, viewer, image, notes)
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
