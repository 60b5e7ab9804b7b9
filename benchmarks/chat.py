"""Time to first token at each turn of a chat on one image, as ratios to stock LLaVA's first turn.

    python benchmarks/chat.py [--rounds 5] [--out benchmarks/results/chat-cpu.md]

A CLIP-L/336 tower and a small language model, both with random weights, loaded by LLaVA's own
builder. The variants take turns in every round, so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from encoder import make_tower
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

from llava_hvp import HIVTP, prune
from llava_hvp.host import compat
from llava_hvp.testing import make_checkpoint

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


def measure(model: Any, tokenizer: Any, rounds: int) -> dict[str, list[list[float]]]:
    """Ratios to stock's first turn of the same round: variant -> rounds of turns."""
    ratios: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds + 1):
        pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(number))
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
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--out", type=Path, help="Markdown file")
    options = parser.parse_args()
    compat.bridge()
    with tempfile.TemporaryDirectory() as folder:
        make_tower(f"{folder}/tower")
        path = make_checkpoint(
            f"{folder}/llava-1.5", vision_tower=f"{folder}/tower", layers=6, hidden_size=256
        )
        tokenizer, model, *_ = load_pretrained_model(
            str(path), None, path.name, device="cpu", device_map="cpu"
        )
        ratios = measure(model.float(), tokenizer, options.rounds)
    about = (
        f"{os.cpu_count()}-core CPU, {torch.get_num_threads()} torch threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}. CLIP-L/336 and a language "
        f"model of 6 layers of 256, float32, r_max 0.5; time to first token, medians over "
        f"{options.rounds} rounds of ratios to stock's first turn."
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
