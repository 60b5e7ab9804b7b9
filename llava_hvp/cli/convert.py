"""`llava-hvp convert`: a LLaVA checkpoint in the form of transformers' own classes, and back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.chat_templates import TEMPLATES
from llava_hvp.checkpoints.form import is_transformers, read_config
from llava_hvp.cli.extras import need
from llava_hvp.cli.parser import add_command
from llava_hvp.console import say
from llava_hvp.errors import LlavaHvpError, OptionError

EXAMPLES = (
    "llava-hvp convert shapes/llava-shapes shapes-hf",
    "llava-hvp convert shapes-hf llava-shapes-again",
)


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        "write a LLaVA checkpoint for transformers' own classes, or one of these for LLaVA",
        "The weights are the same, under other names.",
        EXAMPLES,
    )
    parser.add_argument("source", type=Path, help="folder of a checkpoint of either form")
    parser.add_argument(
        "target",
        type=Path,
        help="a new folder; LLaVA's loader goes by its name, which wants `llava` in it, and "
        "`mistral` for a Mistral",
    )
    parser.add_argument(
        "--conv-mode",
        choices=TEMPLATES,
        help="LLaVA's conversation template that the chat template says; by default what fits the "
        "name and the language model",
    )
    parser.set_defaults(main=main)


@dataclass(frozen=True)
class ConvertSettings:
    """What `llava-hvp convert` reads and writes.

    Parameters
    ----------
    conv_mode : str | None
        of the chat template; None for what fits
    """

    source: Path
    target: Path
    conv_mode: str | None


def parse(args: argparse.Namespace) -> ConvertSettings:
    """The settings; raises OptionError for what is wrong, with nothing loaded."""
    need("host", "sentencepiece")
    config = read_config(args.source)
    if not config:
        raise OptionError(f"{args.source}: no folder with a config.json: give a checkpoint's")
    if is_transformers(args.source):
        name = args.target.resolve().name.lower()
        wanted = ["llava"] + ["mistral"] * (
            config.get("text_config", {}).get("model_type") == "mistral"
        )
        missing = [word for word in wanted if word not in name]
        if missing:
            raise OptionError(
                f"{args.target}: LLaVA's loader goes by the folder's name: put "
                f"{' and '.join(map(repr, missing))} into it"
            )
    return ConvertSettings(args.source, args.target, args.conv_mode)


def run(settings: ConvertSettings) -> int:
    """Write, and say what to type next; the exit code."""
    from llava_hvp.checkpoints.convert import convert

    back = is_transformers(settings.source)
    try:
        path = convert(settings.source, settings.target, settings.conv_mode)
    except LlavaHvpError:
        raise
    except Exception as error:  # a file that is missing or damaged, a full disk
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"{settings.source}: cannot be converted: {reason}") from error
    loader = (
        f"LLaVA's loader opens it: python -m llava.serve.cli --model-path {path} --image-file …"
        if back
        else f"AutoModelForImageTextToText.from_pretrained({str(path)!r}) opens it"
    )
    say(f"wrote {path}; {loader}")
    return 0


def main(args: argparse.Namespace) -> int:
    """Parse and run."""
    return run(parse(args))
