"""The pictures of `llava-hvp show`; it comes with torch, when there is a model to draw with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from llava_hvp.checkpoints.variants import Variant
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.cli.show_settings import ShowSettings
from llava_hvp.pruning.report import ImageReport
from llava_hvp.show.heatmap import heat_maps
from llava_hvp.show.inside import shown_of
from llava_hvp.show.overlay import (
    NARROWEST,
    captioned,
    grid,
    original_of,
    overlay,
    scale_for,
    titled,
)
from llava_hvp.show.page import MethodShown, Page, Shown

QUESTION = "What is in the picture?"  # where none is asked; methods that read it insist on one
CELL = 520  # pixels, the width of a picture in a grid of several


class Drawing:
    """One picture as a model sees it, drawn as the settings ask.

    Parameters
    ----------
    notes : list[str]
        on how the picture was read
    """

    def __init__(
        self, settings: ShowSettings, viewer: Viewer, image: Image, notes: list[str]
    ) -> None:
        self.settings, self.viewer, self.image, self.notes = settings, viewer, image, notes
        self.ids = viewer.prompt(settings.prompt or QUESTION)
        self.name = Path(settings.image_file).name
        self.title = " ".join([f"{self.name}, {viewer.name}.", *notes])

    def heat_maps(self) -> Image:
        """The attention that patches receive, a panel a layer."""
        frame = self.viewer.view.frame(self.image)
        received = self.viewer.received_attention(self.image, self.settings.layers)
        return heat_maps(frame, received, scale=self.settings.scale, title=self.title)

    def overlays(self) -> Image:
        """One overlay, or a grid: a column a method, a row a budget, none in every row."""
        settings = self.settings
        unpruned = self._answer(Variant())[0] if settings.prompt else None
        if len(settings.variants) == 1:
            (variant,) = settings.variants
            report, answers = self._pruned(variant, unpruned)
            kept = overlay(
                report, self.image, title=str(variant), notes=self.notes, answers=answers
            )
            return titled(kept, settings.prompt or self.title)
        panels = self.viewer.view.frame(self.image)
        columns = [
            [self._cell(variant, unpruned) for variant in column] for column in settings.columns
        ]
        rows = max(map(len, columns))
        columns = [cells * (rows // len(cells)) for cells in columns]
        picture = original_of(self.image, panels, scale_for(panels, CELL))
        told = "unpruned" if settings.prompt else self.viewer.view.describe(self.image.size)
        original = captioned(picture, told, unpruned, least=NARROWEST)
        cells = list(zip(*columns, strict=True))
        return grid(cells, original, settings.prompt or self.title)

    def _cell(self, variant: Variant, unpruned: str | None) -> Image:
        """One picture of a grid."""
        report, answers = self._pruned(variant, unpruned)
        return overlay(
            report, self.image, title=str(variant), answers=answers, original=False, widest=CELL
        )

    def _pruned(
        self, variant: Variant, unpruned: str | None
    ) -> tuple[ImageReport, tuple[str, str] | None]:
        """What is kept and, where something was asked, both answers."""
        if unpruned is None:
            return self._look(variant), None
        if not variant.prunes:
            return self._look(variant), (unpruned, unpruned)
        answer, report = self._answer(variant)
        return report, (unpruned, answer)

    def page(self) -> str:
        """The HTML page."""
        viewer, settings = self.viewer, self.settings
        received = viewer.received_attention(self.image, settings.layers)
        unpruned = self._answer(Variant())[0] if settings.prompt else ""
        return Page(
            title=self.name,
            model=viewer.name,
            panels=viewer.view.frame(self.image),
            methods=[self._method(budgets, unpruned) for budgets in settings.columns],
            received=received,
            notes=[viewer.view.describe(self.image.size), *self.notes],
            prompt=settings.prompt or "",
            unpruned=unpruned,
        ).render()

    def _method(self, budgets: Sequence[Variant], unpruned: str) -> MethodShown:
        first = budgets[0]
        return MethodShown(
            first.name,
            first.summary,
            self.viewer.reads(first).received_attention,
            [shown for variant in budgets for shown in self._budget(variant, unpruned)],
        )

    def _budget(self, variant: Variant, unpruned: str) -> list[Shown]:
        """What stays at a budget: at the tower, and after each stage inside the language model."""
        if not variant.prunes:
            return [Shown("everything kept", self._look(variant), unpruned)]
        label = variant.options.replace("=", " ") or "no budget"
        kept, answer = self._look(variant) if not self.settings.prompt else None, ""
        if kept is None:
            answer, kept = self._answer(variant)
        if not kept.stages:
            return [Shown(label, kept, answer)]
        return [Shown(f"{label}, {words}", r, answer) for words, r in shown_of(kept)]

    def _look(self, variant: Variant) -> ImageReport:
        return self.viewer.look(variant, self.image, self.ids)

    def _answer(self, variant: Variant) -> tuple[str, Any]:
        return self.viewer.answer(variant, self.image, self.ids, self.settings.new_tokens)
