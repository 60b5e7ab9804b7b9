"""HiRED: the tokens of an image are allotted to its tiles by CLS attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.errors import ContextError, OptionError
from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import choice, number, selected_layer
from llava_hvp.methods.masks import Grid, top_k
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HiRED(VisionMethod):
    """HiRED (arXiv 2408.10945; code hasanar1f/HiRED@502d6dd).

    The budget is of the image: `num_tokens`, or `r_max` of all its patches, rounded down. A share
    `alpha` of it goes to the tile that shows the whole image; the other tiles share what is left by
    how many of that tile's best patches, by CLS attention of layer 1, lie in their part of it. In
    each tile the patches that CLS attends to most in the layer handed to the projector are kept. A
    single tile has the whole budget, and tiles that stand alone share it evenly.

    What rounding down loses is lost, and a tile may be left with nothing. The released code keeps
    unpad and sends no newlines (`newline="none"`); it swaps rows and columns in packing some
    arrangements, which we do not.

    Parameters
    ----------
    alpha : float
        share of the tile that shows the whole image, in [0, 1]
    variant : str
        "code" cuts the whole image's patches, in raster order, into as many runs as there are other
        tiles, as the released code does (four strips for 2 x 2 tiles); "paper" takes the part that
        a tile shows
    """

    name: ClassVar[str] = "hired"
    summary: ClassVar[str] = "an image's budget allotted to its tiles, by CLS attention"
    roles: ClassVar[tuple[str, ...]] = ("attended",)
    needs_cls: ClassVar[bool] = True
    worth_trying: ClassVar[WorthTrying] = {"alpha": Values((0.25, 0.5, 0.75))}

    alpha: float = 0.5
    variant: str = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "alpha", least=0, most=1)
        choice(self, "variant", ("code", "paper"))

    @property
    def of_image(self) -> bool:
        """True: tiles share the image's budget."""
        return True

    def budget(self, patches: int, tiles: int = 1) -> int:
        """Patches that the tiles of an image may keep together."""
        if self.num_tokens is not None:
            return min(self.num_tokens, tiles * patches)
        return max(1, int(tiles * patches * (1.0 if self.r_max is None else self.r_max)))

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        layers = dict.fromkeys((1, selected_layer(depth, feature_layer)))
        return Needs(cls_attention=tuple(layers), mosaics=True)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        deep = context.score("cls_attention", selected_layer(context.depth, context.feature_layer))
        tiles = context.images[0]
        if tiles == 1:
            return Selection.from_roles({"attended": top_k(deep, budget)})
        if context.mosaics is None:
            raise ContextError(
                f"hired needs mosaics in the context, for images of {tiles} tiles: give (down, "
                "across) of each, or None for one whose tiles stand alone"
            )
        allotted = self._allotted(
            context.score("cls_attention", 1)[::tiles], context, budget, tiles
        )
        return Selection.from_roles({"attended": top_k(deep, allotted.flatten()[:, None])})

    def _allotted(self, shallow: Tensor, context: VisionContext, budget: int, tiles: int) -> Tensor:
        """(images, tiles) patches that each tile may keep.

        Parameters
        ----------
        shallow : Tensor
            (images, N) attention of layer 1 in each image's first tile
        """
        patches, mosaics = context.patches, context.mosaics or ()
        first = min(int(budget * self.alpha), patches)
        left = min(budget - first, (tiles - 1) * patches)
        marked = top_k(shallow, int(patches * (1 - self.alpha))).float()
        part = torch.tensor([self._parts(context.grid, m, tiles - 1) for m in mosaics])
        marks = marked.new_zeros(len(mosaics), tiles - 1)
        marks.scatter_add_(1, part.to(marks.device), marked)
        share = marks / marks.sum(1, keepdim=True).clamp_min(1)
        others = (share * left).floor().clamp_max(patches).long()
        allotted = torch.cat([torch.full_like(others[:, :1], first), others], 1)
        if None not in mosaics:
            return allotted
        alone = torch.tensor([mosaic is None for mosaic in mosaics], device=marks.device)
        return allotted.where(~alone[:, None], self._even_share(budget, tiles))

    def _parts(self, grid: Grid, mosaic: Grid | None, others: int) -> list[int]:
        """For each patch of the whole image, the tile behind the first that has its part of it."""
        patches = grid[0] * grid[1]
        if self.variant == "code" or mosaic is None:
            return [patch * others // patches for patch in range(patches)]
        down, across = mosaic
        rows, columns = grid
        return [
            y * down // rows * across + x * across // columns
            for y in range(rows)
            for x in range(columns)
        ]

    def _even_share(self, budget: int, tiles: int) -> int:
        share = budget // tiles
        if share < 1 and self.num_tokens is not None:
            raise OptionError(
                f"num_tokens={self.num_tokens} for an image of {tiles} tiles that stand alone "
                f"leaves none for a tile: give at least {tiles}"
            )
        return max(1, share)
