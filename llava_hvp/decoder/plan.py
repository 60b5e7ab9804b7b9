"""What a method drops in a decoder of so many layers: where, and how much of each row."""

from __future__ import annotations

from llava_hvp.methods.language import LanguageMethod


class DropPlan:
    """A method on a decoder of `depth` layers.

    Attributes
    ----------
    stages : tuple[Stage, ...]
        where it drops

    Raises
    ------
    OptionError
        stages or a budget that do not fit the depth
    """

    def __init__(self, method: LanguageMethod, depth: int) -> None:
        self.method, self.depth = method, depth
        self.stages = method.stages(depth)
        method.check(depth)
        self._keeps: dict[tuple[int, int], tuple[int, ...]] = {}

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose queries and keys are caught as they run."""
        return tuple(sorted({stage.layer - 1 for stage in self.stages if stage.of == "before"}))

    def drops(self, images: tuple[tuple[int, ...], ...]) -> bool:
        """Whether of rows with these visual tokens by image any goes."""
        return any(
            min(kept, default=sum(row)) < sum(row)
            for row, kept in zip(images, self.kept(images), strict=True)
        )

    def kept(self, images: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Visual tokens that the method keeps of each row at each stage."""
        return tuple(self._of_row(sum(row), len(row)) for row in images)

    def _of_row(self, visual: int, images: int) -> tuple[int, ...]:
        if not visual:
            return (0,) * len(self.stages)
        # A search in some methods, and wanted twice of a prompt: by `drops`, and where it begins.
        if (visual, images) not in self._keeps:
            self._keeps[visual, images] = self.method.keeps(visual, self.depth, images)
        return self._keeps[visual, images]
