"""HiPrune: object anchors of a middle layer, their neighbours, registers of the deep layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import checked_layers, choice, integer, number, scaled_layers
from llava_hvp.methods.masks import Grid, flat_neighbours, neighbours, top_k
from llava_hvp.methods.worth import OneLayer, Values, WorthTrying

BUFFERS: dict[str, tuple[Grid, ...]] = {
    "cross": ((-1, 0), (1, 0), (0, -1), (0, 1)),
    "square": tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)),
    "row": ((0, -1), (0, 1)),
    "none": (),
}


@dataclass(frozen=True, kw_only=True)
class HiPrune(VisionMethod):
    """HiPrune (arXiv 2508.00553, "Prune Visual Tokens by Hierarchical Attention").

    Anchors are the patches that receive most attention in `object_layer`, buffers their
    neighbours, registers the patches that receive most in the layer handed to the projector.
    Exactly the budget is kept.

    Parameters
    ----------
    alpha : float
        in [0, 1]; there are round(alpha * budget / 5) anchors, whatever the buffer. A cross has
        five patches: with it, this is the share of the budget for anchors with their buffers. With
        "square" they take up to 9/5 of that, with "row" 3/5, with "none" 1/5 (0.1 of 192 patches is
        4 anchors: up to 0.19, 0.06 and 0.02).
    object_layer : int | None
        numbered from 1; 9 of 24 by default
    buffer : str
        neighbourhood of an anchor: "cross" (4), "square" (8), "row" (2) or "none"
    variant : str
        "paper", or "code" for neighbours by flat index, which wrap across rows and clamp to the
        first and last patch, as in the released code
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "anchors of layer 9, their neighbours, registers of the last layer"
    roles: ClassVar[tuple[str, ...]] = ("anchor", "buffer", "register")
    worth_trying: ClassVar[WorthTrying] = {
        "object_layer": OneLayer(),
        "alpha": Values((0.0, 0.1, 0.3, 0.6, 1.0), together=(0.1, 1.0)),
        "buffer": Values(tuple(BUFFERS)),
    }

    alpha: float = 0.1
    object_layer: int | None = None
    buffer: str = "cross"
    variant: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "alpha", least=0, most=1)
        choice(self, "buffer", BUFFERS)
        choice(self, "variant", ("paper", "code"))
        if self.object_layer is not None:
            integer(self, "object_layer", least=1)

    def _object_layer(self, depth: int | None, feature_layer: int | None) -> int:
        if self.object_layer is None:
            return scaled_layers((9,), depth, feature_layer)[0]
        return checked_layers((self.object_layer,), depth, feature_layer, "hiprune: object_layer")[
            0
        ]

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        layers = self._object_layer(depth, feature_layer), feature_layer
        return Needs(received_attention=tuple(dict.fromkeys(layer for layer in layers if layer)))

    def choose(self, context: VisionContext, budget: int) -> Selection:
        return Selection.from_roles(self._hierarchy(context, budget, registers_up_to=budget))

    def _hierarchy(self, context: VisionContext, budget: int, registers_up_to: int) -> dict:
        """Anchors and buffers, at most `budget`; registers until `registers_up_to` are kept."""
        object_layer = self._object_layer(context.depth, context.feature_layer)
        middle = context.score("received_attention", object_layer)
        deep = context.score("received_attention", context.feature_layer or 0)
        count = round(self.alpha * budget / 5)
        anchor = top_k(middle, count)
        around = flat_neighbours if self.variant == "code" else neighbours
        buffer = around(anchor, context.grid, BUFFERS[self.buffer]) & ~anchor
        buffer = top_k(middle, budget - count, among=buffer)
        kept = anchor | buffer
        missing = registers_up_to - kept.sum(1, keepdim=True)
        return {"anchor": anchor, "buffer": buffer, "register": top_k(deep, missing, among=~kept)}
