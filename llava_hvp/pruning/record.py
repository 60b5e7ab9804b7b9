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

    Parameters
    ----------
    asked : str | None
        what the process was asked to prune by, as `hivtp r_max=0.5`
    """

    def __init__(self, asked: str | None = None) -> None:
        self._lock = threading.Lock()
        self._asked = asked
        self._all = _Sums()
        self._by_method: dict[str, _Sums] = {}

    @property
    def images(self) -> int:
        """Images encoded."""
        return self._all.images

    @property
    def reused(self) -> int:
        """Images that came again."""
        return self._all.reused

    @property
    def kept_tokens(self) -> int:
        """Visual tokens sent, of all images together."""
        return self._all.kept_tokens

    def add(self, reports: Iterable[ImageReport]) -> None:
        """Count the images of one call."""
        with self._lock:
            for report in reports:
                self._all.add(report)
                self._by_method.setdefault(report.pruned_by or report.method, _Sums()).add(report)

    def add_unpruned(self, images: int, tokens: int) -> None:
        """Count images of which all is kept, and their tokens together."""
        with self._lock:
            self._all.add_unpruned(images, tokens)

    def as_dict(self) -> dict[str, Any]:
        """Counts and mean ratios; the ratios are None where no image was seen.

        With a method inside the language model also the mean ratio of what enters a layer, and the
        tokens that entered each, of all images together. `by_method` has the counts of each method
        that was used.
        """
        counts = self._all.as_dict()
        with self._lock:
            used = {name: sums.as_dict() for name, sums in self._by_method.items()}
        return counts | ({"by_method": used} if used else {})

    def __str__(self) -> str:
        return summary(self.as_dict(), self._asked)


class _Sums:
    """Of some images."""

    def __init__(self) -> None:
        self.images = 0
        self.reused = 0
        self.kept_tokens = 0
        self.stock_tokens = 0
        self._kept_of_stock = 0.0
        self._kept_of_patches = 0.0
        self._average_of_stock = 0.0
        self._layer_tokens: list[int] = []
        self._in_all_layers = 0  # tokens of images of which nothing was dropped inside

    def add(self, report: ImageReport) -> None:
        if report.reused:
            self.reused += 1
            return
        self.images += 1
        self.kept_tokens += report.kept_tokens
        self.stock_tokens += report.stock_tokens
        self._kept_of_stock += report.kept_of_stock
        self._kept_of_patches += report.kept_of_patches
        self._average_of_stock += report.average_tokens / report.stock_tokens
        if report.layer_tokens:
            before = self._layer_tokens or [0] * len(report.layer_tokens)
            pairs = zip(before, report.layer_tokens, strict=True)
            self._layer_tokens = [total + count for total, count in pairs]
        else:
            self._in_all_layers += report.kept_tokens

    def add_unpruned(self, images: int, tokens: int) -> None:
        self.images += images
        self.kept_tokens += tokens
        self.stock_tokens += tokens
        self._kept_of_stock += images
        self._kept_of_patches += images
        self._average_of_stock += images
        self._in_all_layers += tokens

    def as_dict(self) -> dict[str, Any]:
        images = self.images
        inside = {
            "mean_average_of_stock": self._average_of_stock / images if images else None,
            "layer_tokens": [count + self._in_all_layers for count in self._layer_tokens],
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


def summary(counts: dict[str, Any], asked: str | None = None) -> str:
    """As `12 images, kept 48.8% of stock's visual tokens and 48.8% of all patches (means)`.

    Of a chat `1 image, sent 3 times, kept …`; with a method inside the language model `kept 29.2%
    of stock's visual tokens on average over 32 layers, 576 -> 166 after layer 2, and sent …`; of
    several methods, or of another than was asked for, `…; hivtp r_max=0.25: 2 images, 25.0%; none:
    1 image, 100.0%`.
    """
    images = counts["images"]
    if not images:
        return "no image"
    share, inside = _share(counts), " and"
    if counts.get("layer_tokens"):
        layers = [total / images for total in counts["layer_tokens"]]
        inside = f" on average over {len(layers)} layers, {in_stages(layers)}, and sent"
    used = counts.get("by_method", {})
    is_one = len(used) == 1 and (asked is None or asked in used)
    methods = "".join(
        f"; {name}: {_images(each)}{f', {_share(each):.1%}' * bool(each['images'])}"
        for name, each in ({} if is_one else used).items()
    )
    return (
        f"{_images(counts)}, "
        f"kept {share:.1%} of stock's visual tokens{inside} "
        f"{counts['mean_kept_of_patches']:.1%} of all patches (means){methods}"
    )


def _images(counts: dict[str, Any]) -> str:
    images = counts["images"]
    times = f", sent {images + counts['reused']} times" if counts.get("reused") else ""
    return f"{images} image{'s' * (images != 1)}{times}"


def _share(counts: dict[str, Any]) -> float:
    """Of stock's visual tokens, on average over layers where some go on the way."""
    inside = bool(counts.get("layer_tokens"))
    return float(counts["mean_average_of_stock" if inside else "mean_kept_of_stock"] or 0)


def in_stages(layers: Sequence[float]) -> str:
    """Visual tokens that enter each layer, as `576 -> 166 after layer 2`."""
    parts = [f"{layers[0]:.0f}"]
    for ran, (before, now) in enumerate(itertools.pairwise(layers), start=1):
        if now != before:
            parts.append(f"{now:.0f} after layer {ran}")
    return " -> ".join(parts)


def added(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several processes as one; means are over all images."""
    total = _added(counts)
    used = [each.get("by_method", {}) for each in counts]
    if any(used):
        names = dict.fromkeys(name for each in used for name in each)
        total["by_method"] = {
            name: _added([each[name] for each in used if name in each]) for name in names
        }
    return total


def _added(counts: list[dict[str, Any]]) -> dict[str, Any]:
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
        given = sum(c[name] * c["images"] for c in counts if c["images"])
        total[name] = given / images if images else None
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
