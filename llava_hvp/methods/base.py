"""What a pruning method is: a VisionMethod reads a VisionContext and returns a Selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_hvp.errors import ContextError, OptionError, UnsupportedModelError, shown
from llava_hvp.lazy import torch
from llava_hvp.methods.checks import integer, number
from llava_hvp.methods.context import Needs, VisionContext, raise_unless_finite
from llava_hvp.methods.masks import Grid
from llava_hvp.methods.selection import Mix, Selection
from llava_hvp.methods.worth import WorthTrying

__all__ = [
    "Method",
    "Mix",
    "Needs",
    "Selection",
    "VisionContext",
    "VisionMethod",
    "raise_unless_finite",
    "vision_method",
]

_NO_CLS = "use hiprune or hivtp, which read the attention that patches receive"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training-free pruning method: a frozen set of options, and a rule that its kind says.

    Nobody builds on this class itself: a method that chooses at the vision tower is a
    `VisionMethod`.

    Parameters
    ----------
    r_max : float | None
        upper bound on kept / N for each tile, in (0, 1]; 1 keeps all. 0.5 where no budget is given.
        It stands for round(r_max * N) patches, so that the bound holds up to this rounding (0.3 of
        576 is 173 patches, 30.03 %), and for one patch at least.
    num_tokens : int | None
        instead of `r_max`, patches in total for one image, shared evenly by its tiles

    Raises
    ------
    OptionError
        for an option out of its range
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    where: ClassVar[str]  # where it prunes; its kind says it
    listed: ClassVar[bool] = True  # whether it can be had by its name
    worth_trying: ClassVar[WorthTrying] = {}  # of its options, for `llava-hvp tune`

    r_max: float | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.r_max is not None and self.num_tokens is not None:
            raise OptionError(
                f"r_max={shown(self.r_max)} and num_tokens={shown(self.num_tokens)} exclude each "
                "other: give one of them"
            )
        if self.r_max is not None:
            number(self, "r_max", above=0, most=1)
        if self.num_tokens is not None:
            integer(self, "num_tokens", least=1)
        if not self._has_budget():
            object.__setattr__(self, "r_max", 0.5)

    def _has_budget(self) -> bool:
        return self.r_max is not None or self.num_tokens is not None

    @property
    def keeps_all(self) -> bool:
        """Whether the budget alone says that every patch stays."""
        return self.r_max == 1


@dataclass(frozen=True, kw_only=True)
class VisionMethod(Method, ABC):
    """A method at the vision tower: it reads a VisionContext and chooses patches of each tile.

    The rule is `choose`; `reads` says which scores it goes by.
    """

    where: ClassVar[str] = "vision tower"
    needs_cls: ClassVar[bool] = False  # whether it asks the CLS token, which not every tower has
    loose: ClassVar[tuple[str, ...]] = ()  # roles whose tokens follow their tile, off the mosaic
    extra_first: ClassVar[bool] = False  # whether a tile's extra token leads it; else it ends it

    @property
    def of_image(self) -> bool:
        """Whether `budget` is of an image, which its tiles share as the method decides."""
        return False

    def needs(self, depth: int | None, feature_layer: int | None) -> Needs:
        """What to capture on an encoder of `depth` layers that hands on layer `feature_layer`.

        Raises LayerError for a layer out of range or past `feature_layer`. A budget that keeps
        every patch needs no scores.
        """
        needs = self.reads(depth, feature_layer)
        return Needs() if self.keeps_all else needs

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        """What `choose` reads; nothing by default."""
        return Needs()

    def check(self, grid: Grid) -> None:
        """Raise OptionError where these options cannot be met on a tile of this grid."""

    @abstractmethod
    def choose(self, context: VisionContext, budget: int) -> Selection:
        """The rule: at most `budget` < N tokens of each tile. No transfer from the device.

        Where the budget is `of_image`: at most `budget` tokens of each image; all images of the
        context have as many tiles then.
        """

    def budget(self, patches: int, tiles: int = 1) -> int:
        """p_max, the patches that a tile may keep, of `patches`, in an image of `tiles` tiles.

        Where it is `of_image`, of all its tiles together. Tokens at no patch count too.
        """
        if self.num_tokens is None:
            return max(1, round((1.0 if self.r_max is None else self.r_max) * patches))
        share = self.num_tokens // tiles
        if share < 1:
            raise OptionError(
                f"num_tokens={self.num_tokens} for an image of {tiles} tiles leaves none for a "
                f"tile: give at least {tiles}"
            )
        return min(share, patches)

    def select(self, context: VisionContext) -> Selection:
        """Select on every tile of the context.

        Raises
        ------
        ContextError, LayerError
            the context lacks a layer, or the layer cannot exist
        ScoreError
            scores that are not finite
        OptionError
            a budget that the options cannot meet on this grid
        """
        names, finite = context.finite()
        raise_unless_finite(names, finite.tolist())
        return self.select_unchecked(context)

    def select_unchecked(self, context: VisionContext) -> Selection:
        """`select` without the look at the scores, which would wait for the device."""
        self._check_cls(context)
        # Images share num_tokens differently by their tile counts: one pass a budget.
        images = context.images
        groups = [self._group(context.patches, tiles) for tiles in images]
        if len(set(groups)) == 1:
            return self._select_at(context, *groups[0])
        total, device = (context.total_tiles, context.patches), context.device
        merged = {role: torch.zeros(total, dtype=torch.bool, device=device) for role in self.roles}
        of_tile = [group for group, tiles in zip(groups, images, strict=True) for _ in range(tiles)]
        mixes = []
        for group in sorted(set(groups)):
            index = torch.tensor([tile for tile, g in enumerate(of_tile) if g == group])
            among = tuple(t for t, g in zip(images, groups, strict=True) if g == group)
            part = self._select_at(context.rows(index, among), *group)
            mixes.append((index, part.mix))
            for role, mask in part.roles.items():
                merged[role][index.to(device)] = mask
        return Selection.from_roles(merged, mix=Mix.joined(mixes, total[0]))

    def _group(self, patches: int, tiles: int) -> tuple[int, int]:
        """(budget, patches that it is shared among), the same for images selected together."""
        return self.budget(patches, tiles), patches * tiles if self.of_image else patches

    def _select_at(self, context: VisionContext, budget: int, among: int) -> Selection:
        self.check(context.grid)
        if budget < among or not self._has_plain_budget():
            return self.choose(context, budget)
        total = (context.total_tiles, context.patches)
        none = torch.zeros(total, dtype=torch.bool, device=context.device)
        return Selection.from_roles(dict.fromkeys(self.roles, none) | {self.roles[0]: ~none})

    def _has_plain_budget(self) -> bool:
        """Whether a budget of N means that all is kept (not so for sizes given by hand)."""
        return True

    def without_cls(self) -> UnsupportedModelError:
        """The error for a vision tower without the CLS token that the method asks."""
        return UnsupportedModelError(
            f"{self.name} asks the CLS token, and this vision tower has none: {_NO_CLS}"
        )

    def _check_cls(self, context: VisionContext) -> None:
        """Raise where the method asks the CLS token and there is none."""
        if not self.needs_cls or self.keeps_all:
            return
        projections = (*context.keys.values(), *context.queries.values())
        if any(tensor.shape[1] == context.patches for tensor in projections):
            raise self.without_cls()
        if (
            self.needs(context.depth, context.feature_layer).cls_attention
            and not context.cls_attention
        ):
            raise ContextError(
                f"{self.name} needs the CLS token's attention, and the context holds none "
                f"(cls_attention={{}}); for a vision tower without a CLS token {_NO_CLS}"
            )


def vision_method(method: Any) -> VisionMethod:
    """The method, if it is one that chooses at the vision tower; else UnsupportedModelError."""
    if isinstance(method, VisionMethod):
        return method
    if isinstance(method, Method):
        raise UnsupportedModelError(
            f"{type(method).__name__} prunes at {getattr(type(method), 'where', None)!r}, and here "
            f"only at the {VisionMethod.where!r} can be pruned: give a VisionMethod"
        )
    raise UnsupportedModelError(
        f"{method!r} is no Method: give one, as HIVTP(r_max=0.5) or get_method('hivtp')"
    )
