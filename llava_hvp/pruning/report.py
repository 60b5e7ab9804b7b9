"""What pruning did to an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llava_hvp.methods.base import Selection
from llava_hvp.methods.masks import Grid

if TYPE_CHECKING:
    from llava_hvp.show.frame import View


@dataclass(frozen=True, repr=False)
class ImageReport:
    """One image of one call.

    Parameters
    ----------
    method : str
        name of the method, of both as `hivtp+fastv`
    tiles : int
        the encoder saw: 1, or the base tile and the sub-images of AnyRes
    stock_tokens : int
        visual tokens that unpruned LLaVA would send for this image
    kept_tokens : int
        visual tokens sent, image_newline and tokens that stand at no patch included
    sent : Tensor
        (tiles, N) bool, the patches sent: of those selected, the ones outside the padding that
        AnyRes cuts off
    grid : Grid
        (rows, columns) of patches of a tile
    size : tuple[int, int] | None
        (width, height) of the picture in pixels where known
    selection : Selection
        masks of this image, (tiles, N) each, on the CPU
    stock : Tensor | None
        (tiles, N) bool, the patches that unpruned LLaVA would send; None for all
    view : View | None
        how the model sees pictures, to draw on one; None where unknown
    reused : bool
        whether this is what an earlier call made of the same image, as in a chat
    layer_tokens : tuple[int, ...]
        visual tokens of the image that enter each layer of the language model, merged ones
        included; empty where no method prunes inside it
    stages : tuple[Tensor, ...]
        (tiles, N) bool after each stage inside the language model, the patches whose tokens go on;
        merged tokens stand at none
    stage_layers : tuple[int, ...]
        layers that run before each of these stages
    mosaic : Selection | None
        of a picture whose sub-images the host shrinks by interpolation (LLaVA-OneVision's largest),
        (1, tokens) masks of the tokens that it makes of them; there masks of patches, and what
        counts patches, are of those whose centre a kept token covers
    pruned_by : str
        methods with their options, as `hivtp r_max=0.5`
    """

    method: str
    tiles: int
    stock_tokens: int
    kept_tokens: int
    sent: Tensor
    grid: Grid
    size: tuple[int, int] | None
    selection: Selection
    stock: Tensor | None = None
    view: View | None = None
    reused: bool = False
    layer_tokens: tuple[int, ...] = ()
    stages: tuple[Tensor, ...] = ()
    stage_layers: tuple[int, ...] = ()
    mosaic: Selection | None = None
    pruned_by: str = ""

    @property
    def average_tokens(self) -> float:
        """Visual tokens that enter a layer of the language model, averaged over all layers."""
        if not self.layer_tokens:
            return self.kept_tokens
        return sum(self.layer_tokens) / len(self.layer_tokens)

    @property
    def average_of_patches(self) -> float:
        """As `kept_of_patches`, averaged over all layers of the language model."""
        return self.kept_of_patches * self.average_tokens / self.kept_tokens

    @property
    def kept_patches(self) -> int:
        """Patches sent, each a visual token; neither image_newline nor what stands at no patch."""
        return int(self.sent.sum())

    @property
    def tile_tokens(self) -> tuple[int, ...]:
        """Visual tokens sent of each tile, image_newline left out."""
        patches = self.sent.sum(1).tolist()
        return tuple(n + e for n, e in zip(patches, self.selection.extras, strict=True))

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
        inside = ""
        if self.layer_tokens:
            share = self.average_tokens / self.stock_tokens
            inside = f", {self.average_tokens:.1f} ({share:.1%}) averaged over layers"
        return (
            f"<{self.method}: {tiles}, {self.kept_tokens} of {self.stock_tokens} tokens "
            f"({self.kept_of_stock:.1%}), {self.kept_patches} of {patches} patches "
            f"({self.kept_of_patches:.1%}){inside}{', encoded by an earlier call' * self.reused}>"
        )

    def overlay(self, image: Any, *, scale: int | None = None, original: bool = True) -> Any:
        """What was kept, beside the picture as the model sees it: a PIL image.

        Kept patches are in their own colours, outlined by role; pruned ones grey and dark. Pictures
        begin in the top left corner (LLaVA-NeXT: the base tile, then the mosaic); a legend with
        counts stands below.

        Parameters
        ----------
        image : Any
            the PIL image that the model was given. As LLaVA does, it is converted to RGB and not
            turned by its EXIF orientation.
        scale : int | None
            pixels drawn for one that the model sees; what fits a screen by default
        original : bool
            whether the unpruned picture stands at the left

        Raises
        ------
        PictureError
            another picture than the report is of, or one that LLaVA cannot process
        """
        from llava_hvp.show.overlay import overlay

        return overlay(self, image, scale=scale, original=original)

    def _repr_png_(self) -> bytes | None:
        from llava_hvp.show.notebook import png_of

        return png_of(self)

    def _repr_html_(self) -> str:
        from llava_hvp.show.notebook import html_of

        return html_of(self)
