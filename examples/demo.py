"""Two small trained LLaVAs answer questions, with all visual tokens and with a part of them.

`llava-shapes` (LLaVA-1.5) and `llava-shapes-next` (LLaVA-NeXT) come along, 8 MB each. Each is asked
held-out questions about drawn pictures, unpruned, with half and with a quarter of the visual
tokens; then one about a photo, and what was kept of it is drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from llava_hvp import HIVTP, prune
from llava_hvp.accuracy.exam import TEMPLATE, examine
from llava_hvp.accuracy.scores import VariantScore, scores_of
from llava_hvp.checkpoints.variants import variants
from llava_hvp.hosts.hf.versions import OLDEST, release
from llava_hvp.shapes import checkpoint
from llava_hvp.shapes.exams import exam, exam_for

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

PHOTO = Path(__file__).parent.parent / "docs" / "photo.png"
ASKED = "What is to the left of the blue circle?"
# Each with how many questions: one of LLaVA-NeXT takes four times as long.
CHECKPOINTS = {"llava-shapes": 100, "llava-shapes-next": 50}
QUARTER = 0.25
# What both hosts are asked for.
HOSTS = ("none", "hivtp", "hiprune++", "hivtp+fastv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the pictures")
    parser.add_argument("--questions", type=int, help="of each, 100 and 50 by default")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: list[VariantScore] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, questions in CHECKPOINTS.items():
            count = arguments.questions or questions
            found += answer(checkpoint(folder, name), count, arguments.out)
    if release() >= OLDEST:
        print(f"transformers' own classes: same answers, same patches kept ({', '.join(HOSTS)})")
    print(summary(found))
    print(
        "next, try: README.md's quick start; on a LLaVA of yours, --prune-method hivtp --r-max 0.5"
    )


def answer(path: Path, count: int, out: Path) -> list[VariantScore]:
    """Load one checkpoint as LLaVA does, ask it, and print what came of it."""
    from llava_hvp.checkpoints.opening import open_checkpoint

    print(f"{path.name} answers {count} held-out questions about drawings, on this CPU", flush=True)
    # It was trained in this template; LLaVA's chat takes llava_v0 for such a name.
    opened = open_checkpoint(str(path), "cpu", conv_mode=TEMPLATE)
    compared = variants(["hivtp", "random"], [{"r_max": 0.5}, {"r_max": QUARTER}])
    asked = [v for v in compared if v.name != "random" or v.options == f"r_max={QUARTER}"]
    scores = scores_of(examine(opened, list(exam(exam_for(path.name), count)), asked, batch=16))
    for score in scores:
        kept = f"{score.kept_of_patches:.0%} kept by {score.label}" if score.budget else "unpruned"
        print(f"  {kept:<20} {score.overall:>4.0f} % right, in {score.time:.2f} of the time")
    draw(opened, out / f"{path.name}.png")
    if release() >= OLDEST:
        compare_hosts(path, opened)
    return scores


def draw(opened: Any, file: Path) -> None:
    """Ask about the photo, unpruned and with HIVTP's quarter, and draw both."""
    photo, ids = Image.open(PHOTO).convert("RGB"), opened.prompt(ASKED)[None]
    images = opened.images([photo])

    def said() -> str:
        output = opened.model.generate(
            ids, images=images, image_sizes=[photo.size], do_sample=False, max_new_tokens=8
        )
        return str(opened.tokenizer.decode(output[0], skip_special_tokens=True)).strip()

    everything = said()
    with prune(opened.model, HIVTP(r_max=QUARTER)) as pruned:
        part = said()
        pruned.last[0].overlay(photo).save(file)
    print(f"  {file}: {ASKED} {everything}; with a quarter: {part}", flush=True)


def compare_hosts(path: Path, opened: Checkpoint) -> None:
    """Ask transformers' own classes too, which have the same weights; exit where they differ."""
    from llava_hvp.checkpoints.convert import to_transformers
    from llava_hvp.checkpoints.opening import open_checkpoint
    from llava_hvp.checkpoints.viewer import Viewer

    target = to_transformers(path, path.with_name(f"{path.name}-hf"), opened.conv_mode)
    both = [Viewer(one, one.view()) for one in (opened, open_checkpoint(str(target), "cpu"))]
    photo = Image.open(PHOTO).convert("RGB")
    for name in HOSTS:
        variant = variants([name], [{"r_max": QUARTER}])[-1]
        (said, mine), (answer, theirs) = (
            viewer.answer(variant, photo, viewer.prompt(ASKED), 8) for viewer in both
        )
        kept = [torch.stack((r.sent, *r.stages)) for r in (mine, theirs) if r is not None]
        if said != answer or not all(torch.equal(one, kept[0]) for one in kept):
            sys.exit(f"{target.name}: {variant}: {answer!r}, on LLaVA's {said!r}")


def summary(scores: Sequence[VariantScore]) -> str:
    """What the rows come to, in a sentence."""

    def mean(method: str, of: str, budget: str = f"r_max={QUARTER}") -> float:
        found = [
            s
            for s in scores
            if s.method == method and s.budget == ("" if method == "none" else budget)
        ]
        return float(sum(getattr(s, of) for s in found) / len(found))

    return (
        f"so: {mean('none', 'overall'):.0f} % of the answers are right with all visual tokens, "
        f"{mean('hivtp', 'overall'):.0f} % with the quarter that HIVTP keeps, in "
        f"{mean('hivtp', 'time'):.2f} of the time; {mean('random', 'overall'):.0f} % with a random "
        "quarter"
    )


if __name__ == "__main__":
    main()
