"""Pictures whose sub-images a host shrinks by interpolation: the choice is among what it sends.

LLaVA-OneVision does so with its largest. A token there is no patch's, so that the base tile is
chosen on as ever, and the mosaic as one tile more, of as many patches as it has tokens: what a
method reads of the patches, scores, states and projections, is interpolated as their features are.
No source says what a method should do there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import Method, Selection, VisionContext, VisionMethod
from llava_hvp.methods.masks import Grid

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Shrunk:
    """The mosaic of one picture, shrunk.

    Parameters
    ----------
    size : Size
        of the picture
    grid : Grid
        (rows, columns) of the tokens that are sent of it
    patches : Tensor
        (rows, columns) int64, the patches that they are made of, as in `pruning.layout`
    shrink : Callable[[Tensor], Tensor]
        (T, N, D) float, values of all patches of the picture -> (tokens, D), as the host does it
    """

    size: Size
    grid: Grid
    patches: Tensor = field(compare=False)
    shrink: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def tokens(self) -> int:
        """Tokens that are sent of the mosaic, newlines left out."""
        return self.grid[0] * self.grid[1]

    def drawn(self, base: Selection, chosen: Selection) -> Selection:
        """The choice in patches, (T, N): of the mosaic those whose centre a kept token covers.

        Parameters
        ----------
        base : Selection
            (T, N) masks, of which the first tile's count
        chosen : Selection
            (1, tokens) masks, of the mosaic
        """
        rows, columns = (
            ((torch.arange(n) + 0.5) * tokens / n).long()
            for n, tokens in zip(self.patches.shape, self.grid, strict=True)
        )
        masks = {}
        for role, mask in base.roles.items():
            masks[role] = mask.clone()
            covered = chosen.roles[role].view(self.grid)[rows][:, columns]
            masks[role].view(-1)[self.patches.flatten()] = covered.flatten()
        return Selection.from_roles(masks)


def select(
    method: VisionMethod, context: VisionContext, shrunk: Sequence[Shrunk | None]
) -> tuple[Selection, tuple[Selection | None, ...]]:
    """Select on every tile but those of shrunk mosaics, and on each of these as a whole.

    Of `r_max` a mosaic may keep that share of its tokens. Of `num_tokens` the base tile has a
    tile's share, and the mosaic the rest.

    Parameters
    ----------
    shrunk : Sequence[Shrunk | None]
        of each image of the context

    Returns
    -------
    (T, N) masks, in which nothing of a shrunk mosaic is kept, and (1, tokens) masks of each

    Raises
    ------
    UnsupportedModelError
        a method that merges tokens
    """
    context = dataclasses.replace(context, mosaics=None)
    plain: list[int] = []
    parts: list[tuple[list[int], Selection]] = []
    mosaics: list[Selection | None] = []
    first = 0
    for image, (tiles, each) in enumerate(zip(context.images, shrunk, strict=True)):
        if each is None:
            plain += range(first, first + tiles)
            mosaics.append(None)
        else:
            ours, rest = _shared(method, context.patches, tiles)
            base = context.rows(torch.tensor([first]), (1,))
            parts.append(([first], ours.select_unchecked(base)))
            mosaics.append(rest.select_unchecked(_of_mosaic(context, image, first, tiles, each)))
        first += tiles
    if plain:
        own = tuple(n for n, each in zip(context.images, shrunk, strict=True) if each is None)
        parts.append((plain, method.select_unchecked(context.rows(torch.tensor(plain), own))))
    found = [part for _, part in parts] + [each for each in mosaics if each is not None]
    if any(each.mix is not None for each in found):
        raise UnsupportedModelError(
            f"{method.name} merges tokens, which is not done for pictures so large that "
            "LLaVA-OneVision shrinks their features: use a method that selects, as hiprune, or "
            "give a smaller picture"
        )
    shape = (context.total_tiles, context.patches)
    masks = {
        role: torch.zeros(shape, dtype=torch.bool, device=context.device)
        for role in parts[0][1].roles
    }
    for index, part in parts:
        for role, mask in part.roles.items():
            masks[role][torch.tensor(index, device=context.device)] = mask
    return Selection.from_roles(masks), tuple(mosaics)


def _shared(method: VisionMethod, patches: int, tiles: int) -> tuple[VisionMethod, VisionMethod]:
    """The method for the base tile, and for the mosaic of the other tiles."""
    if method.num_tokens is None:
        return method, method
    share = method.budget(patches, tiles) // (tiles if method.of_image else 1)
    parts: list[Method] = [
        dataclasses.replace(method, num_tokens=count)
        for count in (share, method.num_tokens - share)
    ]
    return parts[0], parts[1]  # type: ignore[return-value]


def _of_mosaic(
    context: VisionContext, image: int, first: int, tiles: int, shrunk: Shrunk
) -> VisionContext:
    """The mosaic of one image as a context of one tile."""

    def taken(values: Tensor) -> Tensor:
        own = values[first : first + tiles].float()
        return shrunk.shrink(own if own.ndim == 3 else own[..., None]).view(
            1, shrunk.tokens, *own.shape[2:]
        )

    def maybe(values: Tensor | None) -> Tensor | None:
        return None if values is None else taken(values)

    layers = ("received_attention", "cls_attention", "keys", "queries")
    by_layer: dict[str, Any] = {
        name: {layer: taken(values) for layer, values in getattr(context, name).items()}
        for name in layers
    }
    # Processors of such a model leave no padding inside a picture.
    padding = None if context.padding is None else context.padding.new_zeros(1, shrunk.tokens)
    return dataclasses.replace(
        context,
        **by_layer,
        grid=shrunk.grid,
        features=maybe(context.features),
        relevance=maybe(context.relevance),
        projected=maybe(context.projected),
        words=None if context.words is None else (context.words[image],),
        padding=padding,
        mosaics=None,
        tiles=(1,),
    )
