"""The tokens of an image as indices: what the host would send unpruned, in its order.

A token is named by its patch, `tile * N + patch` counted over the image's own tiles; those of a
mosaic that was shrunk are numbered behind all patches. NEWLINE stands for an `image_newline`, EXTRA
less the tile's number for a tile's token that stands at no patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.pruning.shrunk import Shrunk

NEWLINE = -1
EXTRA = -2
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class LooseTokens:
    """What a method sends beside the mosaic, tile by tile; unpad cuts none of it.

    Parameters
    ----------
    before, after : Sequence[Tensor]
        (tokens,) int64 of each tile, what leads its placed tokens and what follows
    """

    before: Sequence[Tensor]
    after: Sequence[Tensor]


@dataclass(frozen=True)
class Layout:
    """The tokens of one image before pruning.

    Parameters
    ----------
    base : Tensor
        (n,) int64, patches that come first, in order
    mosaic : Tensor | None
        (rows, columns) int64, the sub-images as one picture, or None. Of thin pictures unpad leaves
        no row or no column
    newline : bool
        whether an image_newline ends each mosaic row (without a mosaic: the image)
    shrunk : Shrunk | None
        where the host interpolates the mosaic, how; its tokens are no patches'
    """

    base: Tensor
    mosaic: Tensor | None = None
    newline: bool = False
    shrunk: Shrunk | None = None

    @property
    def stock_tokens(self) -> int:
        """Tokens that the host sends unpruned."""
        if self.mosaic is None:
            return len(self.base) + self.newline
        rows, columns = self.mosaic.shape
        return len(self.base) + rows * (columns + self.newline)

    def stock(self, patches: int) -> Tensor:
        """(patches,) bool of an image of so many patches: those that the host sends unpruned."""
        sent = torch.zeros(patches, dtype=torch.bool)
        sent[self.base] = True
        table = self.mosaic if self.shrunk is None else self.shrunk.patches
        if table is not None:
            sent[table.flatten()] = True
        return sent

    def kept(self, keep: Tensor, newline: str, loose: LooseTokens | None = None) -> Tensor:
        """(tokens,) int64, the tokens that stay, in order.

        Tokens beside the mosaic enclose their own tile where it comes first; those of the
        sub-images follow the mosaic, first all that lead, then the others tile by tile.

        Parameters
        ----------
        keep : Tensor
            (tiles * N,) bool, on the CPU, of the patches that stay in their places
        newline : str
            "all" keeps every one, "none" none, "rows" those of rows that did not lose all their
            patches; a row in which stock sends nothing else has none to lose
        loose : LooseTokens | None
            tokens beside the mosaic; none by default
        """
        if loose is None:
            return torch.cat((self.base[keep[self.base]], self._rows(keep, newline)))
        tiles = self.base.split(len(keep) // len(loose.before))
        parts = []
        for tile, before, after in zip(tiles, loose.before, loose.after, strict=False):
            parts += [before, tile[keep[tile]], after]
        rest = loose.before[len(tiles) :], loose.after[len(tiles) :]
        return torch.cat((*parts, self._rows(keep, newline), *rest[0], *rest[1]))

    def _rows(self, keep: Tensor, newline: str) -> Tensor:
        """What stays of the mosaic, with the newlines that end its rows, or the image."""
        if self.mosaic is None:
            ends = self.newline and newline != "none"
            return torch.full((int(ends),), NEWLINE)
        table, stays = self.mosaic, keep[self.mosaic]
        if self.newline:
            occupied = stays.any(1, keepdim=True)
            edge = {
                "rows": occupied if table.shape[1] else torch.ones_like(occupied),
                "all": torch.ones_like(occupied),
                "none": torch.zeros_like(occupied),
            }[newline]
            stays = torch.cat((stays, edge), dim=1)
            table = torch.cat((table, table.new_full((len(table), 1), NEWLINE)), dim=1)
        return table[stays]
