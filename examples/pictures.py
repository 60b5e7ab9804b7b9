"""Every picture in docs/, drawn anew: `make pictures`.

`photo.png` is a photo of scikit-image's (Chelsea the cat by Stefan van der Walt, CC0) with four
shapes and a number drawn on it, since the checkpoints that come along answer about shapes and
digits only. The others come from the commands that are printed, and the plots from their JSON.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from llava_hvp.accuracy import tables
from llava_hvp.accuracy.scores import VariantScore
from llava_hvp.bench import plot as bench
from llava_hvp.cli import main as llava_hvp
from llava_hvp.shapes import checkpoint
from llava_hvp.shapes.drawing import draw_on
from llava_hvp.shapes.scenes import Number, Scene, Thing

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Square, around the face; twice the 168 pixels that llava-shapes sees.
FACE, SIDE = (75, 0, 375, 300), 336
STICKERS = Scene(
    168,
    168,
    (
        Thing("star", "red", 28, 28, 36, 10),
        Thing("circle", "blue", 140, 118, 32, 0),
        Thing("square", "green", 142, 26, 30, 8),
        Thing("triangle", "yellow", 24, 118, 34, -8),
    ),
    Number("305", 84, 152, 21),
    style=0,
    busy=0,
)
ASKED = "What is to the left of the blue circle?"
SHOW = (
    "--image-file photo.png --prune-method hivtp --r-max 0.25 --prune-opt layers=6 "
    f"--conv-mode vicuna_v1 --prompt '{ASKED}' -o kept.png",
    "--image-file photo.png --methods hivtp,hiprune --r-max 0.5,0.25 -o methods.png",
    "--image-file photo.png --prune-method visionzip --r-max 0.25 -o merged.png",
    "--image-file photo.png --layers 1,4,6,9,11 -o layers.png",
    "--image-file shapes.png --layers 1,4,6,9,11 -o results/accuracy/layers.png",
)


def photo() -> Image.Image:
    """The cat with shapes and a number on it."""
    from skimage.data import chelsea

    face = Image.fromarray(chelsea()).crop(FACE).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    draw_on(face, STICKERS)
    return face


def show(arguments: str, model: Path) -> None:
    """Run one command, in docs/."""
    print(f"$ llava-hvp show --model-path {model.name} {arguments}", flush=True)
    typed = [str(DOCS / word) if word.endswith(".png") else word for word in shlex.split(arguments)]
    if llava_hvp(["show", "--model-path", str(model), "--device", "cpu", *typed]):
        sys.exit("failed")


def plots() -> None:
    """The plot beside each results file that has one."""
    drawn = [png for png in DOCS.glob("results/**/*.png") if png.with_suffix(".json").exists()]
    for png in sorted(drawn):
        about = json.loads(png.with_suffix(".json").read_text())
        if "accuracy" in about["command"].split():
            scores = [VariantScore(**row) for row in about["rows"]]
            figure, dpi = tables.figure_of(tables.title_of(about), scores), 100
        else:
            rows: Any = [_named(row) for row in about["rows"]]
            figure, dpi = bench.figure_of(bench.title_of(about), rows), 110
        figure.savefig(png, dpi=dpi)
        print(f"drew {png.relative_to(DOCS)}")


def _named(row: dict[str, Any]) -> Any:
    """A row of a results file; older ones have no averages over layers."""
    row = {"average_tokens": row["kept_tokens"], **row}
    return json.loads(json.dumps(row), object_hook=_Row)


class _Row(SimpleNamespace):
    """Fields of a JSON object, by name and by key."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(**fields)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def main() -> None:
    photo().save(DOCS / "photo.png", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(folder, "llava-shapes")
        for arguments in SHOW:
            show(arguments, model)
    plots()


if __name__ == "__main__":
    main()
