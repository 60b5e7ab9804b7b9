"""What pruning did to an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_hvp.methods.base import Selection
from llava_hvp.select import Grid


@dataclass(frozen=True, repr=False)
class ImageReport:
    """One image of one call.

    method : name of the method
    tiles : the encoder saw: 1, or the base tile and the sub-images of AnyRes
    stock_tokens : visual tokens that unpruned LLaVA would send for this image
    kept_tokens : visual tokens sent, image_newline included
    sent : (tiles, N) bool, the patches sent: of those selected, the ones outside the padding that
        AnyRes cuts off
    grid : (rows, columns) of patches of a tile
    size : (width, height) of the picture in pixels where known
    selection : masks of this image, (tiles, N) each, on the CPU
    """

    method: str
    tiles: int
    stock_tokens: int
    kept_tokens: int
    sent: Tensor
    grid: Grid
    size: tuple[int, int] | None
    selection: Selection

    @property
    def kept_patches(self) -> int:
        """Visual tokens sent, image_newline left out."""
        return int(self.sent.sum())

    @property
    def kept_of_stock(self) -> float:
        """Kept tokens / stock tokens of this image."""
        return self.kept_tokens / self.stock_tokens

    @property
    def kept_of_patches(self) -> float:
        """Kept patches / (N * tiles): what `r_max` bounds, so newlines do not count."""
        return self.kept_patches / (self.grid[0] * self.grid[1] * self.tiles)

    def __repr__(self) -> str:
        tiles = "1 tile" if self.tiles == 1 else f"{self.tiles} tiles"
        patches = self.grid[0] * self.grid[1] * self.tiles
        return (
            f"<{self.method}: {tiles}, {self.kept_tokens} of {self.stock_tokens} tokens "
            f"({self.kept_of_stock:.1%}), {self.kept_patches} of {patches} patches "
            f"({self.kept_of_patches:.1%})>"
        )
