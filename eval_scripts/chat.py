"""Time to first token at each turn of a chat on one image, as ratios to stock LLaVA's first turn.

    python eval_scripts/chat.py [--geometry llava-1.5-160m] [--rounds 5] [--out FILE.md]

Random weights in a published shape. The variants take turns in every round, so that a machine that
slows down slows all.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from llava.mm_utils import tokenizer_image_token

from llava_hvp import HIVTP, prune
from llava_hvp.bench.machine import machine, versions
from llava_hvp.checkpoints.geometry import get_geometry, list_geometries
from llava_hvp.checkpoints.synthetic import build_model, build_text
from llava_hvp.hosts.llava import compat

TURNS = ("What is in the picture?", "And what is behind it?", "What could happen next?")
VARIANTS = ("stock", "hivtp, encoded at every turn", "hivtp, encoded once")


def chat(tokenizer: Any, model: Any, pixels: torch.Tensor) -> Iterator[float]:
    """Seconds to the first token of each turn; answers of a fixed length go into the history."""
    history = "A chat between a user and an assistant."
    for number, question in enumerate(TURNS):
        mark = "" if number else "<image>\n"
        history += f" USER: {mark}{question} ASSISTANT:"
        ids = tokenizer_image_token(history, tokenizer, return_tensors="pt")[None]
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, images=pixels, do_sample=False, max_new_tokens=1)
        yield time.perf_counter() - started
        history += " It is a photo of a thing that stands in a place."


def measure(model: Any, tokenizer: Any, side: int, rounds: int) -> dict[str, list[list[float]]]:
    """Ratios to stock's first turn of the same round: variant -> rounds of turns."""
    ratios: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds + 1):
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(number))
        first = 0.0
        for variant in VARIANTS:
            with ExitStack() as stack:
                if variant != "stock":
                    pruned = stack.enter_context(prune(model, HIVTP(r_max=0.5)))
                    pruned.reuse = variant.endswith("once")
                seconds = list(chat(tokenizer, model, pixels))
            first = seconds[0] if variant == "stock" else first
            if number:  # the first round warms up
                ratios[variant].append([s / first for s in seconds])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--geometry", choices=list_geometries(), default="llava-1.5-160m")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--out", type=Path, help="Markdown file")
    options = parser.parse_args()
    compat.bridge()
    torch.manual_seed(0)
    geometry = get_geometry(options.geometry)
    tokenizer, _ = build_text(geometry, "cpu")
    model = build_model(geometry, "cpu", torch.float32)
    ratios = measure(model, tokenizer, geometry.vision.image, options.rounds)
    about = (
        f"{machine(torch.device('cpu'))}; {versions()}. {geometry.name} with random weights, "
        f"float32, r_max 0.5; time to first token, medians over {options.rounds} rounds of ratios "
        "to stock's first turn."
    )
    lines = [f"    {shlex.join(['python', *sys.argv])}", "", about, ""]
    lines += ["| | turn 1 | turn 2 | turn 3 |", "| --- | --- | --- | --- |"]
    for variant, rounds in ratios.items():
        cells = (f"{statistics.median(turn):.2f}" for turn in zip(*rounds, strict=True))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
