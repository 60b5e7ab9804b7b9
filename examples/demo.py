"""The main job, end to end: stock loader, a real photo, every method at five budgets.

Makes a tiny LLaVA-1.5 and a tiny LLaVA-NeXT checkpoint (random weights: the answers mean nothing,
the counts and the plumbing are real), loads both through LLaVA's own builder, prunes, generates,
prints what was kept and how long the first token took, and draws the kept patches over the photo.
Then types two of LLaVA's own commands with our flags: an eval script and a chat.
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
from typing import Any

import skimage
from PIL import Image

from llava_hvp import Method, get_method, list_methods, prune
from llava_hvp.host import compat
from llava_hvp.report import ImageReport
from llava_hvp.testing import make_checkpoint

PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"
BUDGETS = (0.75, 0.5, 0.4, 0.25, 0.11)
QUESTION = "What is in the picture?"
PROMPT = f"A chat between a user and an assistant. USER: <image>\n{QUESTION} ASSISTANT:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, default=PHOTO)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the pictures")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each row")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    photo = Image.open(arguments.photo).convert("RGB")
    print(f"photo: {arguments.photo.name}, {photo.width} x {photo.height}")
    compat.bridge()  # so that unpruned LLaVA, the first row, runs on any supported transformers
    with tempfile.TemporaryDirectory() as folder:
        for version, name in (("1.5", "llava-1.5-tiny"), ("next", "llava-next-tiny")):
            # A language model large enough for its share of the time to show.
            checkpoint = make_checkpoint(
                Path(folder) / name, version=version, layers=6, hidden_size=256
            )
            run(checkpoint, photo, arguments.out, arguments.rounds)
        type_commands(Path(folder) / "llava-1.5-tiny", arguments.photo)


def run(checkpoint: Path, photo: Image.Image, out: Path, rounds: int) -> None:
    """Load one checkpoint as LLaVA does, and go through all methods and budgets."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device="cpu", device_map="cpu"
    )
    model.float()
    images = process_images([photo], processor, model.config).float()
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]

    def generate(tokens: int) -> Any:
        return model.generate(
            ids,
            images=images,
            image_sizes=[photo.size],
            do_sample=False,
            max_new_tokens=tokens,
        )

    def first_token() -> float:
        started = time.perf_counter()
        generate(1)
        return time.perf_counter() - started

    def beside_stock(method: Method) -> tuple[float, float, str, ImageReport]:
        """TTFT in seconds, its ratio to stock's of the same round, the answer, the report."""
        times, ratios = [], []
        for _ in range(rounds):
            stock = first_token()
            with prune(model, method):
                times.append(first_token())
                ratios.append(times[-1] / stock)
        with prune(model, method) as pruned:
            answer = tokenizer.decode(generate(8)[0], skip_special_tokens=True)
        return statistics.median(times), statistics.median(ratios), answer, pruned.last[0]

    first_token()  # warm-up
    stock = statistics.median(first_token() for _ in range(rounds))
    answer = tokenizer.decode(generate(8)[0], skip_special_tokens=True)
    print(f"\n{checkpoint.name}: {tuple(images.shape)} pixels")
    header = f"{'method':<10} {'r_max':>5} {'kept':>5} {'of':>5} {'tokens':>7} {'patches':>8}"
    print(f"{header} {'TTFT':>8} {'ratio':>6}  answer")
    print(
        f"{'none':<10} {'':>5} {'':>5} {'':>5} {'':>7} {'':>8} {stock:>6.3f} s {1:>6.2f}  {answer}"
    )
    for name in list_methods():
        for r_max in BUDGETS:
            seconds, ratio, answer, report = beside_stock(get_method(name, r_max=r_max))
            print(
                f"{name:<10} {r_max:>5} {report.kept_tokens:>5} {report.stock_tokens:>5} "
                f"{report.kept_of_stock:>7.1%} {report.kept_of_patches:>8.1%} {seconds:>6.3f} s "
                f"{ratio:>6.2f}  {answer}"
            )
            if r_max == 0.25:
                path = out / f"{checkpoint.name}-{name.replace('+', 'p')}.png"
                report.overlay(photo).save(path)
    print(f"kept patches at r_max 0.25, by role: {out / checkpoint.name}-*.png")


def type_commands(checkpoint: Path, photo: Path) -> None:
    """What a user types, with what comes back of it."""
    model = f"--model-path {checkpoint} --image-file {photo} --temperature 0"
    question = f'--query "{QUESTION}" --max_new_tokens 8 --device cpu'
    chat = "--max-new-tokens 8 --device cpu"
    for command in (
        f"python -m llava.eval.run_llava {model} {question} --prune-method hivtp --r-max 0.5",
        f"printf 'What is it?\\nAnd what else?\\n\\n' | python -m llava.serve.cli {model} {chat} "
        "--prune-method hiprune --r-max 0.33",
    ):
        print(f"\n$ {command}", flush=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environ = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
        shell = subprocess.run(
            ["bash", "-c", command], env=environ, stderr=subprocess.PIPE, text=True
        )
        told = [line for line in shell.stderr.splitlines() if line.startswith("llava-hvp: ")]
        print("\n".join(told))
        if shell.returncode:
            sys.exit(shell.stderr)


if __name__ == "__main__":
    main()
