"""The main job, end to end: stock loader, a picture, questions, every method at a quarter.

With the trained LLaVAs that come along, `llava-shapes` (LLaVA-1.5) and `llava-shapes-next`
(LLaVA-NeXT): their answers unpruned and pruned (HIVTP at five budgets), what was kept, how long the
first token took, and the kept patches drawn over the picture. Then two of LLaVA's own commands with
our flags: an eval script and a chat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from llava_hvp import Method, get_method, list_methods, prune
from llava_hvp.checkpoints.variants import variants
from llava_hvp.hosts.hf.versions import OLDEST, release
from llava_hvp.pruning.report import ImageReport
from llava_hvp.shapes import checkpoint

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

DOCS = Path(__file__).parent.parent / "docs"
BUDGETS, QUARTER = (0.75, 0.5, 0.4, 0.25, 0.11), 0.25
# For each checkpoint a picture, and questions about it with what is right.
SHOWN = {
    "llava-shapes": (
        DOCS / "shapes.png",
        {
            "What colour is the square?": "Orange",
            "Where is the green triangle?": "Top",
            "What is to the left of the green triangle?": "Orange square",
            "Which digits are written?": "612",
        },
    ),
    "llava-shapes-next": (
        DOCS / "details.png",
        {
            "What colour is the circle?": "Yellow",
            "Where is the yellow circle?": "Left",
            "What is to the left of the green square?": "Yellow circle",
            "Which digits are written?": "825",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the pictures")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each row")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (picture, asked) in SHOWN.items():
            run(checkpoint(folder, name), picture, asked, arguments.out, arguments.rounds)
        type_commands(Path(folder) / "llava-shapes", SHOWN["llava-shapes"][0])


def run(path: Path, picture: Path, asked: dict[str, str], out: Path, rounds: int) -> None:
    """Load one checkpoint as LLaVA does, and go through all methods and budgets."""
    from llava_hvp.checkpoints.opening import open_checkpoint

    # The numbers in the README are of this template; LLaVA's chat takes llava_v0 for these names.
    opened = open_checkpoint(str(path), "cpu", conv_mode="vicuna_v1")
    model, photo = opened.model, Image.open(picture).convert("RGB")
    images = opened.images([photo])
    prompts = [opened.prompt(question)[None] for question in asked]

    def generate(ids: Any, tokens: int) -> str:
        output = model.generate(
            ids,
            images=images,
            image_sizes=[photo.size],
            do_sample=False,
            max_new_tokens=tokens,
        )
        return str(opened.tokenizer.decode(output[0], skip_special_tokens=True)).strip()

    def first_token() -> float:
        started = time.perf_counter()
        generate(prompts[0], 1)
        return time.perf_counter() - started

    def answers() -> str:
        said = [generate(ids, 8) for ids in prompts]
        # What is wrong stands in brackets.
        return " | ".join(
            a if a == right else f"({a})" for a, right in zip(said, asked.values(), strict=True)
        )

    def beside_stock(method: Method) -> tuple[float, float, str, ImageReport]:
        """TTFT in seconds, its ratio to stock's of the same round, the answers, the report."""
        times, ratios = [], []
        for _ in range(rounds):
            stock = first_token()
            with prune(model, method, tokenizer=opened.tokenizer):
                times.append(first_token())
                ratios.append(times[-1] / stock)
        with prune(model, method, tokenizer=opened.tokenizer) as pruned:
            said = answers()
            return statistics.median(times), statistics.median(ratios), said, pruned.last[0]

    first_token()  # warm-up
    stock = statistics.median(first_token() for _ in range(rounds))
    print(f"\n{path.name}, {picture.name}: {photo.width} x {photo.height} pixels")
    print(f"asked: {' | '.join(asked)}")
    header = f"{'method':<11} {'r_max':>5} {'kept':>5} {'of':>5} {'tokens':>7} {'patches':>8}"
    print(f"{header} {'TTFT':>8} {'ratio':>6}  answers, wrong ones in brackets")
    blank = f"{'none':<11} {'':>5} {'':>5} {'':>5} {'':>7} {'':>8}"
    print(f"{blank} {stock:>6.3f} s {1:>6.2f}  {answers()}")
    for name in list_methods():
        # One method at every budget, the others at a quarter: more is what `accuracy` is for.
        for r_max in BUDGETS if name == "hivtp" else (QUARTER,):
            seconds, ratio, said, report = beside_stock(get_method(name, r_max=r_max))
            print(
                f"{name:<11} {r_max:>5} {report.average_tokens:>5.0f} {report.stock_tokens:>5} "
                f"{report.average_tokens / report.stock_tokens:>7.1%} "
                f"{report.kept_of_patches:>8.1%} {seconds:>6.3f} s "
                f"{ratio:>6.2f}  {said}"
            )
            if r_max == QUARTER:
                report.overlay(photo).save(out / f"{path.name}-{name.replace('+', 'p')}.png")
    print(f"kept patches at r_max 0.25, by role: {out / path.name}-*.png")
    if release() >= OLDEST:
        compare_hosts(path, opened, photo, list(asked))


def compare_hosts(path: Path, opened: Checkpoint, photo: Image.Image, asked: list[str]) -> None:
    """Ask transformers' own classes too, which have the same weights; exit where they differ."""
    from llava_hvp.checkpoints.convert import to_transformers
    from llava_hvp.checkpoints.opening import open_checkpoint
    from llava_hvp.checkpoints.viewer import Viewer

    target = to_transformers(path, path.with_name(f"{path.name}-hf"), opened.conv_mode)
    both = [Viewer(one, one.view()) for one in (opened, open_checkpoint(str(target), "cpu"))]
    for name in ("none", "hivtp", "hiprune++", "hivtp+fastv"):
        variant = variants([name], [{"r_max": QUARTER}])[-1]
        for question in asked:
            (said, mine), (answer, theirs) = (
                viewer.answer(variant, photo, viewer.prompt(question), 8) for viewer in both
            )
            kept = [torch.stack((r.sent, *r.stages)) for r in (mine, theirs) if r is not None]
            if said != answer or not all(torch.equal(one, kept[0]) for one in kept):
                sys.exit(f"{target.name}: {variant}: {question} {answer!r}, on LLaVA's {said!r}")
    print(
        f"{target.name}, by transformers' own classes: the same answers and kept patches "
        f"(none, hivtp, hiprune++ and hivtp+fastv at {QUARTER})"
    )


def type_commands(path: Path, photo: Path) -> None:
    """What a user types, with what comes back of it."""
    model = f"--model-path {path} --image-file {photo} --temperature 0"
    question = '--query "Where is the green triangle?" --max_new_tokens 8 --device cpu'
    chat = "--max-new-tokens 8 --device cpu"
    for command in (
        f"python -m llava.eval.run_llava {model} {question} --prune-method hivtp --r-max 0.5",
        "printf 'Is there a purple triangle?\\nWhere is the orange square?\\n\\n' | "
        f"python -m llava.serve.cli {model} {chat} --prune-method hiprune++ --r-max 0.33",
    ):
        print(f"\n$ {command}", flush=True)
        places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environ = {**os.environ, "PATH": places, "PYTHONWARNINGS": "ignore"}
        shell = subprocess.run(
            ["bash", "-c", command], env=environ, stderr=subprocess.PIPE, text=True
        )
        told = [line for line in shell.stderr.splitlines() if line.startswith("llava-hvp: ")]
        print("\n".join(told))
        if shell.returncode:
            sys.exit(shell.stderr)


if __name__ == "__main__":
    main()
