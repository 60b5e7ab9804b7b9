"""How many images a process pruned, and the record of it that lies beside its answers."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_hvp.pruning.report import ImageReport

SUFFIX = ".hvp.json"
TRAINED = "hvp.json"  # of a training's output folder
UNWRITTEN = ".unwritten"  # of the empty file of a process that could not write its report


class Totals:
    """Sums over all images of a process; several threads may add.

    The ratios are means over images, so that an image of five tiles counts as one of one tile. An
    image that comes again and is not encoded again, as in a chat, counts as `reused` only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.images = 0
        self.reused = 0
        self.kept_tokens = 0
        self.stock_tokens = 0
        self._kept_of_stock = 0.0
        self._kept_of_patches = 0.0
        self._average_of_stock = 0.0
        self._layer_tokens: list[int] = []

    def add(self, reports: Iterable[ImageReport]) -> None:
        """Count the images of one call."""
        with self._lock:
            for report in reports:
                if report.reused:
                    self.reused += 1
                    continue
                self.images += 1
                self.kept_tokens += report.kept_tokens
                self.stock_tokens += report.stock_tokens
                self._kept_of_stock += report.kept_of_stock
                self._kept_of_patches += report.kept_of_patches
                if report.layer_tokens:
                    self._average_of_stock += report.average_tokens / report.stock_tokens
                    before = self._layer_tokens or [0] * len(report.layer_tokens)
                    pairs = zip(before, report.layer_tokens, strict=True)
                    self._layer_tokens = [total + count for total, count in pairs]

    def add_unpruned(self, images: int, tokens: int) -> None:
        """Count images of which all is kept, and their tokens together."""
        with self._lock:
            self.images += images
            self.kept_tokens += tokens
            self.stock_tokens += tokens
            self._kept_of_stock += images
            self._kept_of_patches += images

    def as_dict(self) -> dict[str, Any]:
        """Counts and mean ratios; the ratios are None where no image was seen.

        With a method inside the language model also the mean ratio of what enters a layer, and the
        tokens that entered each, of all images together.
        """
        images = self.images
        inside = {
            "mean_average_of_stock": self._average_of_stock / images if images else None,
            "layer_tokens": self._layer_tokens,
        }
        return {
            "images": images,
            "reused": self.reused,
            "kept_tokens": self.kept_tokens,
            "stock_tokens": self.stock_tokens,
            "mean_kept_of_stock": self._kept_of_stock / images if images else None,
            "mean_kept_of_patches": self._kept_of_patches / images if images else None,
            **(inside if self._layer_tokens else {}),
        }

    def __str__(self) -> str:
        return summary(self.as_dict())


def summary(counts: dict[str, Any]) -> str:
    """As `12 images, kept 48.8% of stock's visual tokens and 48.8% of all patches (means)`.

    Of a chat `1 image, sent 3 times, kept …`; with a method inside the language model `kept 29.2%
    of stock's visual tokens on average over 32 layers, 576 -> 166 after layer 2, and sent …`.
    """
    images = counts["images"]
    if not images:
        return "no image"
    share, inside = counts["mean_kept_of_stock"], " and"
    if counts.get("layer_tokens"):
        layers = [total / images for total in counts["layer_tokens"]]
        share = counts["mean_average_of_stock"]
        inside = f" on average over {len(layers)} layers, {in_stages(layers)}, and sent"
    times = f", sent {images + counts['reused']} times" if counts.get("reused") else ""
    return (
        f"{images} image{'s' * (images != 1)}{times}, "
        f"kept {share:.1%} of stock's visual tokens{inside} "
        f"{counts['mean_kept_of_patches']:.1%} of all patches (means)"
    )


def in_stages(layers: Sequence[float]) -> str:
    """Visual tokens that enter each layer, as `576 -> 166 after layer 2`."""
    parts = [f"{layers[0]:.0f}"]
    for ran, (before, now) in enumerate(itertools.pairwise(layers), start=1):
        if now != before:
            parts.append(f"{now:.0f} after layer {ran}")
    return " -> ".join(parts)


def added(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several processes as one; means are over all images."""
    images = sum(c["images"] for c in counts)
    total: dict[str, Any] = {
        name: sum(c.get(name, 0) for c in counts)
        for name in ("images", "reused", "kept_tokens", "stock_tokens")
    }
    means = ["mean_kept_of_stock", "mean_kept_of_patches"]
    if counts and all(c.get("layer_tokens") for c in counts):  # one method for all processes
        means.append("mean_average_of_stock")
        layers = [c["layer_tokens"] for c in counts]
        total["layer_tokens"] = [sum(each) for each in zip(*layers, strict=True)]
    for name in means:
        total[name] = sum(c[name] * c["images"] for c in counts) / images if images else None
    return total


def record_path(answers: Path) -> Path:
    """Where the record of an answers file lies."""
    return answers.with_name(answers.name + SUFFIX)


def answers_facts(answers: Path) -> dict[str, Any]:
    """Name, lines and SHA-256 of an answers file: a file written over later is found out."""
    content = answers.read_bytes()
    return {
        "file": answers.name,
        "lines": content.count(b"\n"),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
