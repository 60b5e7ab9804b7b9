"""How many images a process pruned, and the record of it that lies beside its answers."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_hvp.pruning.report import ImageReport

SUFFIX = ".hvp.json"
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

    def add_unpruned(self, images: int, tokens: int) -> None:
        """Count images of which all is kept, and their tokens together."""
        with self._lock:
            self.images += images
            self.kept_tokens += tokens
            self.stock_tokens += tokens
            self._kept_of_stock += images
            self._kept_of_patches += images

    def as_dict(self) -> dict[str, Any]:
        """Counts and mean ratios; the ratios are None where no image was seen."""
        images = self.images
        return {
            "images": images,
            "reused": self.reused,
            "kept_tokens": self.kept_tokens,
            "stock_tokens": self.stock_tokens,
            "mean_kept_of_stock": self._kept_of_stock / images if images else None,
            "mean_kept_of_patches": self._kept_of_patches / images if images else None,
        }

    def __str__(self) -> str:
        return summary(self.as_dict())


def summary(counts: dict[str, Any]) -> str:
    """As `12 images, kept 48.8% of stock's visual tokens and 48.8% of all patches (means)`.

    Of a chat `1 image, sent 3 times, kept …`.
    """
    images = counts["images"]
    if not images:
        return "no image"
    times = f", sent {images + counts['reused']} times" if counts.get("reused") else ""
    return (
        f"{images} image{'s' * (images != 1)}{times}, "
        f"kept {counts['mean_kept_of_stock']:.1%} of stock's "
        f"visual tokens and {counts['mean_kept_of_patches']:.1%} of all patches (means)"
    )


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
