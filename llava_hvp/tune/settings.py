"""What a run of `llava-hvp tune` was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_hvp.checkpoints.variants import Variant
from llava_hvp.tune.questions import Asked, Halves


@dataclass(frozen=True)
class TuneSettings:
    """What `llava-hvp tune` tries of which methods, by which questions.

    Parameters
    ----------
    model : str
        a shipped checkpoint's name, or what `model_path` is called
    model_path : str | None
        None for a shipped one
    bits : int | None
        4 or 8 to quantise
    asked : tuple[Asked, ...]
        all questions
    methods : tuple[str, ...]
        names, or two joined by +
    fixed : Mapping[str, Mapping[str, Any]]
        by method, the options that are not tried but given
    agreement : float | None
        share of answers that are to stay the same, at the smallest budget; None to look for options
    unpruned : Variant
        what candidates are compared with
    out : Path
        of what is found; other files go beside it
    plots : bool
        whether a plot can be drawn
    """

    model: str
    model_path: str | None
    model_base: str | None
    conv_mode: str | None
    bits: int | None
    device: str
    asked: tuple[Asked, ...]
    new_tokens: int
    batch: int
    seed: int
    methods: tuple[str, ...]
    budgets: tuple[dict[str, float | int], ...]
    fixed: Mapping[str, Mapping[str, Any]]
    agreement: float | None
    unpruned: Variant
    out: Path
    restart: bool
    plots: bool

    @property
    def halves(self) -> Halves:
        """Of the questions, by picture."""
        return Halves.of(self.asked, self.seed)
