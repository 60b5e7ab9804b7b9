"""`llava-hvp bench --fit`: what batch and what prompt fit into a memory, worked out from shapes."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_hvp.checkpoints.before_loading import check_inside
from llava_hvp.checkpoints.geometry import LlavaGeometry, get_geometry
from llava_hvp.cli.arguments import at_least, check_folder, exclude, listed, whole, write_results
from llava_hvp.errors import OptionError, shown
from llava_hvp.tables import MARKDOWN, TERMINAL, text_table

if TYPE_CHECKING:
    from llava_hvp.bench.memory import Layout
    from llava_hvp.checkpoints.variants import Variant

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# Of a GPU, for CUDA's context, the libraries' workspaces and the gaps between torch's blocks.
RESERVED = 800 * 10**6
OTHERS = (
    "host",
    "model_path",
    "model_base",
    "conv_mode",
    "image_file",
    "image_size",
    "all_attentions",
)


@dataclass(frozen=True)
class FitSettings:
    """What is to fit into how much.

    Parameters
    ----------
    size : int
        bytes of the device
    layouts : tuple[Layout, ...]
        of each geometry
    variants : tuple[Variant, ...]
        the first is unpruned
    text_tokens, new_tokens : int
        of a prompt beside its image, and of an answer
    """

    size: int
    geometries: tuple[LlavaGeometry, ...]
    layouts: tuple[Layout, ...]
    variants: tuple[Variant, ...]
    batches: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    out: Path | None

    @property
    def room(self) -> int:
        """Bytes that torch may take."""
        return self.size - RESERVED * (self.layouts[0].device == "cuda")


def bytes_of(text: str) -> int:
    """Bytes of a size as 8GB or 8GiB; raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text.strip())
    if not found or not float(found[1]):
        raise OptionError(
            f"--fit {shown(text)}: give a size as 8GB (8 x 10^9 bytes) or 8GiB (8 x 2^30, 7 % "
            "more, which is what a card sold with 8 GB has)"
        )
    return int(float(found[1]) * UNITS[found[2]])


def parse(args: argparse.Namespace, variants: Sequence[Variant]) -> FitSettings:
    """The settings; raises OptionError or LayerError for what is wrong."""
    from llava_hvp.bench.memory import Layout

    size = bytes_of(args.fit)
    for other in OTHERS:
        exclude(args, "fit", other)
    if args.load_8bit:
        raise OptionError("--fit knows 4 bit only: give --load-4bit, or neither")
    if args.geometry is None:
        raise OptionError("--fit is worked out from shapes: give --geometry NAME,NAME")
    for name in ("new_tokens", "text_tokens"):
        at_least(args, name, 1)
    check_folder(args.out)
    device = (args.device or "cuda").partition(":")[0]
    half = args.load_4bit or device == "cuda"
    element = BYTES[args.dtype or ("float16" if half else "float32")]
    geometries = tuple(get_geometry(name) for name in dict.fromkeys(args.geometry.split(",")))
    layouts = []
    for geometry in geometries:
        # As LLaVA's scripts leave the tower.
        tower = element if geometry.is_next else BYTES["float32"]
        tower = BYTES[args.tower_dtype] if args.tower_dtype else tower
        layouts.append(Layout(element, tower, args.load_4bit, device))
        for variant in variants:
            check_inside(variant.pruning, geometry.language.layers)
            variant.needs(geometry.vision)
    return FitSettings(
        size=size,
        geometries=geometries,
        layouts=tuple(layouts),
        variants=tuple(variants),
        batches=tuple(listed(args.batch, whole, "--batch")),
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        out=args.out,
    )


def run(settings: FitSettings) -> int:
    """Work out and print; the exit code, 1 where nothing fits."""
    rows = {
        geometry.name: _rows(settings, geometry, layout)
        for geometry, layout in zip(settings.geometries, settings.layouts, strict=True)
    }
    print(_page(settings, rows, TERMINAL))
    if settings.out:
        content = {
            "command": _command(),
            "size": settings.size,
            "room": settings.room,
            "rows": rows,
        }
        page = _page(settings, rows, MARKDOWN)
        name = "-".join(["fit", *rows, *["4bit"] * settings.layouts[0].four_bit])
        write_results(settings.out / name, content, page, None)
    return 0 if any(row["batch_that_fits"] for each in rows.values() for row in each) else 1


def _rows(settings: FitSettings, geometry: LlavaGeometry, layout: Layout) -> list[dict[str, Any]]:
    return [
        _row(settings, geometry, layout, variant, batch)
        for variant in settings.variants
        for batch in settings.batches
    ]


def _row(
    settings: FitSettings, geometry: LlavaGeometry, layout: Layout, variant: Variant, batch: int
) -> dict[str, Any]:
    from llava_hvp.bench.memory import MOST, Memory, memory, most, visual_tokens

    entering = visual_tokens(geometry, variant.pruning)
    positions = max(0, MOST - entering[0] - settings.new_tokens)

    def peak(batch: int, text: int) -> Memory:
        return memory(
            geometry,
            variant,
            layout,
            batch=batch,
            text_tokens=text,
            new_tokens=settings.new_tokens,
        )

    here = peak(batch, settings.text_tokens)
    return {
        "method": variant.name,
        "options": variant.options,
        "visual_tokens": sum(entering) / len(entering),
        "batch": batch,
        **asdict(here),
        "total": here.total,
        "batch_that_fits": most(lambda n: peak(n, settings.text_tokens).total <= settings.room),
        "text_that_fits": most(lambda n: peak(batch, n).total <= settings.room, positions),
        "text_at_most": positions,
    }


def _page(settings: FitSettings, rows: dict[str, list[dict[str, Any]]], style: str) -> str:
    reserved = settings.size - settings.room
    parts = [
        f"{'    ' if style == MARKDOWN else ''}{_command()}",
        f"{settings.size / 1e9:.2f} GB ({settings.size / 2**30:.2f} GiB)"
        + (f", of which {reserved / 1e9:.1f} GB are left to CUDA itself." if reserved else "."),
        f"Worked out from the shapes for prompts of {settings.text_tokens} text tokens and answers "
        f"of {settings.new_tokens}: the most that is held at once, for a picture that takes all "
        "tiles. GB are 10^9 bytes. `text that fits` is beside one image and the answer; a * marks "
        "where positions end before memory does.",
    ]
    for name, each in rows.items():
        bits = ", 4 bit" if settings.layouts[0].four_bit else ""
        parts.append(("## " if style == MARKDOWN else "") + name + bits)
        parts.append(text_table([_cells(row) for row in each], style))
        if not any(row["batch_that_fits"] for row in each):
            parts.append(f"{name} does not fit, pruned or not: quantise it, or give more memory.")
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    text = row["text_that_fits"]
    ends = "*" if text and text == row["text_at_most"] else ""
    return {
        "method": row["method"],
        "options": row["options"],
        "visual tokens": f"{row['visual_tokens']:.0f}",
        "batch": str(row["batch"]),
        **{f"{n} GB": f"{row[n] / 1e9:.2f}" for n in ("weights", "encode", "prefill", "decode")},
        "total GB": f"{row['total'] / 1e9:.2f}",
        "batch that fits": str(row["batch_that_fits"] or "none"),
        "text that fits": f"{text}{ends}" if text else "none",
    }


def _command() -> str:
    return shlex.join(["llava-hvp", *sys.argv[1:]])
