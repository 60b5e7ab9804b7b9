"""By which protocol figures came about: what has to be alike before two of them are compared."""

from __future__ import annotations

import string
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from llava_hvp.evaluation.settings import is_next
from llava_hvp.runtime import PruningConfig, Runtime

ONE_TILE = "one tile"
# How a field is called in a sentence.
NAMES = {
    "tiling": "tiling",
    "packing": "packing",
    "tokens": "tokens",
    "dtype": "dtype",
    "tower": "vision tower",
    "mme": "MME",
}


@dataclass(frozen=True)
class Protocol:
    """How figures came about, as far as it moves them; "" is what a source does not state.

    Parameters
    ----------
    tiling : str
        "one tile" of a LLaVA-1.5; of a LLaVA-NeXT "stock", or the one size of all images, as "672"
    packing : str
        of tiles, as "stock, newline=rows" or "spatial"; "one tile" where there is nothing to pack
    tokens : str
        what a number of tokens is of: an image or a tile
    dtype : str
        of the language model, as "float16"
    tower : str
        dtype and attention of the vision tower, as "float16 eager"
    mme : str | None
        which of MME's scores a figure of it is; None where there is none
    """

    tiling: str = ""
    packing: str = ""
    tokens: str = ""
    dtype: str = ""
    tower: str = ""
    mme: str | None = None

    def __str__(self) -> str:
        """As `one tile an image; tokens of an image; model float16; not stated: vision tower`."""
        if self.tiling == self.packing == ONE_TILE:
            said = {"tiling": f"{ONE_TILE} an image", "packing": ""}
        else:
            said = {"tiling": f"tiling {self.tiling}", "packing": f"packing {self.packing}"}
        said |= {
            "tokens": f"tokens of {'an image' if self.tokens == 'image' else 'a tile'}",
            "dtype": f"model {self.dtype}",
            "tower": f"vision tower {self.tower}",
            "mme": f"MME {self.mme}",
        }
        values = asdict(self)
        parts = [text for field, text in said.items() if values[field] and text]
        missing = [name for field, name in NAMES.items() if values[field] == ""]
        return "; ".join([*parts, *([f"not stated: {', '.join(missing)}"] if missing else [])])

    def unlike(self, other: Protocol) -> list[str]:
        """Names of what both state, and state otherwise."""
        mine, others = asdict(self), asdict(other)
        return [
            name
            for field, name in NAMES.items()
            if mine[field] and others[field] and mine[field] != others[field]
        ]


def measured_protocol(
    pruning: PruningConfig | None,
    model_path: str,
    *,
    tiling: str = "stock",
    dtype: str = "",
    tower: str = "",
    mme: str | None = None,
) -> Protocol:
    """Of what was measured here.

    Parameters
    ----------
    tiling : str
        of unpruned LLaVA; a pruned one's is an option of its running
    """
    if not is_next(model_path):
        return Protocol(ONE_TILE, ONE_TILE, "image", dtype, tower, mme)
    if pruning is not None:
        tiling = pruning.runtime.tiling
    packing = "stock" if pruning is None else _packing(pruning.runtime)
    return Protocol(tiling, packing, "image", dtype, tower, mme)


def _packing(runtime: Runtime) -> str:
    if runtime.patch_merge == "spatial":  # has no newlines
        return runtime.patch_merge
    return f"{runtime.patch_merge}, newline={runtime.newline}"


def counted(benchmark: str, metric: str) -> str | None:
    """Which of MME's scores a metric is, of either harness; None for another benchmark."""
    if benchmark != "mme":
        return None
    names = [name for name in ("perception", "cognition") if name in metric]
    return " + ".join(names or ["perception", "cognition"])  # LLaVA's "total"


class Letters:
    """A letter for each protocol of a table, and what they stand for."""

    def __init__(self) -> None:
        self._known: dict[Protocol, str] = {}

    def of(self, protocols: Collection[Protocol]) -> str:
        """As `B` or `B C`."""
        for protocol in protocols:
            number = len(self._known)
            letter = string.ascii_uppercase[number % 26] * (1 + number // 26)
            self._known.setdefault(protocol, letter)
        return " ".join(dict.fromkeys(self._known[protocol] for protocol in protocols))

    def legend(self) -> str:
        """A line for each."""
        return "\n".join(["Protocols:", *(f"{at}  {p}." for p, at in self._known.items())])


def columns_of(protocol: Protocol) -> dict[str, Any]:
    """For other programs: a column each."""
    values = asdict(protocol)
    headings = NAMES | {"tokens": "tokens of", "dtype": "model dtype"}
    return {heading: values[field] or "" for field, heading in headings.items()}
