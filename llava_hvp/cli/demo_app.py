"""`llava-hvp demo-app`: a page where methods and budgets answer side by side."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.before_loading import check_before_loading
from llava_hvp.checkpoints.naming import model_name, named_path
from llava_hvp.checkpoints.variants import Variant, name_of, variants
from llava_hvp.cli.arguments import add_loading, at_least, bits_of, device_of, listed
from llava_hvp.cli.extras import need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.methods import NONE, list_methods
from llava_hvp.shapes import checkpoint, list_checkpoints
from llava_hvp.shapes.exams import exam, exam_for
from llava_hvp.shapes.scenes import Scene

LOCAL = "127.0.0.1"
PICTURES, SEARCHED = 4, 100  # pictures, of so many questions

EXAMPLES = ("llava-hvp demo-app",)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "demo-app",
        "open a page that compares methods on your pictures, side by side",
        "It is served to this machine only, until Ctrl-C; pip install 'llava-hvp[app]' brings "
        "Gradio.",
        EXAMPLES,
    )
    what = parser.add_argument_group("what answers")
    what.add_argument(
        "--model-path",
        help=f"a LLaVA checkpoint; {list_checkpoints()[0]}, which is shipped, by default",
    )
    add_loading(what)
    what.add_argument("--new-tokens", type=int, default=64, help="of an answer, 64 by default")
    first = parser.add_argument_group("what is ticked at first")
    first.add_argument(
        "--methods", default="hivtp,hiprune", metavar="NAME,NAME", help="hivtp,hiprune by default"
    )
    first.add_argument("--r-max", default="0.5,0.25", metavar="R,R", help="0.5,0.25 by default")
    where = parser.add_argument_group("where the page is")
    where.add_argument(
        "--host", default=LOCAL, help=f"{LOCAL}, this machine only; 0.0.0.0 for others to reach it"
    )
    where.add_argument("--port", type=int, help="the first free one from 7860 on by default")
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class AppSettings:
    """What `llava-hvp demo-app` serves, and where.

    Parameters
    ----------
    model_path : str | None
        None for the shipped checkpoint
    bits : int | None
        4 or 8 to quantise
    methods : tuple[str, ...]
        ticked at first
    r_max : tuple[float, ...]
        budgets that are ticked at first
    port : int | None
        None for the first free one
    """

    model_path: str | None
    model_base: str | None
    conv_mode: str | None
    device: str
    bits: int | None
    new_tokens: int
    methods: tuple[str, ...]
    r_max: tuple[float, ...]
    host: str
    port: int | None


def parse(args: argparse.Namespace) -> AppSettings:
    """The settings; raises OptionError for what is wrong, with nothing loaded."""
    need("app", "gradio")
    need("host", "PIL", "sentencepiece", "accelerate")
    bits = bits_of(args)
    at_least(args, "new_tokens", 1)
    if args.port is not None and not 0 < args.port < 65536:
        raise OptionError(f"--port {args.port}: give one from 1 to 65535")
    names = [name for name in args.methods.split(",") if name_of(name) != NONE]
    r_max = listed(args.r_max, float, "--r-max")
    chosen = variants(names, [{"r_max": budget} for budget in r_max])
    path = None if args.model_path is None else named_path(args.model_path)
    if path is not None:
        check_before_loading(path, [variant.pruning for variant in chosen])
    return AppSettings(
        model_path=path,
        model_base=args.model_base,
        conv_mode=args.conv_mode,
        device=device_of(args.device),
        bits=bits,
        new_tokens=args.new_tokens,
        methods=tuple(names),
        r_max=tuple(r_max),
        host=args.host,
        port=args.port,
    )


def run(settings: AppSettings) -> int:
    """Load, serve until Ctrl-C; the exit code."""
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        path = settings.model_path or str(checkpoint(folder, list_checkpoints()[0]))
        name = model_name(path)
        say(f"loading {name} on {settings.device} …")
        examples = _examples(Path(folder), name)
        # LLaVA and the model come only now: whatever was typed wrong has been said.
        from PIL import Image

        from llava_hvp.app.comparing import answers
        from llava_hvp.app.page import build, serve
        from llava_hvp.checkpoints.viewer import Viewer

        viewer = Viewer.load(
            path,
            settings.model_base,
            settings.device,
            bits=settings.bits,
            conv_mode=settings.conv_mode,
        )
        picture, question = examples[0]
        with Image.open(picture) as opened:  # the first call of a process is slow
            viewer.answer(Variant(), opened.convert("RGB"), viewer.prompt(question), 1)

        def ask(image: Any, question: str, methods: Any, r_max: Any) -> Any:
            return answers(viewer, image, question, methods, r_max, settings.new_tokens)

        known = list(dict.fromkeys((*settings.methods, *list_methods())))
        page = build(
            ask,
            name,
            known,
            ticked=settings.methods,
            budgets=settings.r_max,
            examples=examples,
        )
        try:
            serve(page, settings.host, settings.port, lambda at: say(f"open {at} (Ctrl-C ends)"))
        except OSError as error:
            raise OptionError(f"--port {settings.port}: {error}") from error
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))


def _examples(folder: Path, name: str) -> list[tuple[Path, str]]:
    """Drawn pictures of unlike questions."""
    from llava_hvp.shapes.drawing import draw

    found: dict[str, tuple[Path, str]] = {}
    drawn: list[Scene] = []
    for scene, question in exam(exam_for(name), SEARCHED):
        if question.task not in found and scene not in drawn and len(found) < PICTURES:
            drawn.append(scene)
            picture = folder / f"example-{len(drawn)}.png"
            draw(scene).save(picture)
            found[question.task] = (picture, question.text)
    return list(found.values())
