"""What a pruning method is: a Method reads a VisionContext and returns a Selection."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llava_hvp.errors import ContextError, OptionError, ScoreError, shown
from llava_hvp.methods.options import choice, integer, number
from llava_hvp.select import Grid


@dataclass(frozen=True)
class Needs:
    """What a method reads. Nothing else is captured.

    Layers are numbered from 1. `relevance` names the text side ("clip" or "llm"), or is None.
    """

    received: tuple[int, ...] = ()
    cls: tuple[int, ...] = ()
    features: bool = False
    relevance: str | None = None


@dataclass(frozen=True)
class VisionContext:
    """What the vision encoder saw on T tiles of N patches.

    Parameters
    ----------
    grid : (rows, columns) of patches; N = rows * columns
    received : layer -> (T, N) float, the attention each patch receives (mean over heads and over
        all query rows, CLS row included, CLS column dropped)
    depth : layers of the encoder
    select : the layer whose output goes to the projector, numbered from 1
    cls : layer -> (T, N) float, the attention that CLS pays to each patch (mean over heads)
    features : (T, N, D) float, the output of layer `select`
    relevance : (T, N) float, how related each patch is to the prompt
    tiles : tiles of each image, in order; the T tiles are one image by default

    Raises
    ------
    ContextError : where shapes disagree
    """

    grid: Grid
    received: Mapping[int, Tensor] = field(default_factory=dict)
    depth: int | None = None
    select: int | None = None
    cls: Mapping[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    relevance: Tensor | None = None
    tiles: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ContextError(f"grid={self.grid!r}: give (rows, columns), both at least 1")
        if self.tiles is not None and (not self.tiles or min(self.tiles) < 1):
            raise ContextError(f"tiles={self.tiles!r}: give the number of tiles of each image")
        for name, tensor in self._named():
            self._check_shape(name, tuple(tensor.shape), 3 if name == "features" else 2)

    def _check_shape(self, name: str, shape: tuple[int, ...], dims: int) -> None:
        on_grid, rest = f"on a grid of {self.grid[0]} x {self.grid[1]}", ", D" * (dims == 3)
        if len(shape) != dims:
            # How many tiles there are cannot be read from such a shape.
            raise ContextError(
                f"{name} has shape {shape}: T tiles {on_grid} need (T, {self.patches}{rest}), one "
                f"tile (1, {self.patches}{rest})"
            )
        if shape[:2] != (self.total_tiles, self.patches):
            raise ContextError(
                f"{name} has shape {shape}: {self.total_tiles} tiles {on_grid} need "
                f"({self.total_tiles}, {self.patches}{rest})"
            )

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        yield from ((f"received[{layer}]", s) for layer, s in self.received.items())
        yield from ((f"cls[{layer}]", s) for layer, s in self.cls.items())
        if self.features is not None:
            yield "features", self.features
        if self.relevance is not None:
            yield "relevance", self.relevance

    @property
    def patches(self) -> int:
        """N, the patches of a tile."""
        return self.grid[0] * self.grid[1]

    @property
    def total_tiles(self) -> int:
        """T, the tiles of all images together."""
        if self.tiles is not None:
            return sum(self.tiles)
        return next((tensor.shape[0] for _, tensor in self._named()), 1)

    @property
    def device(self) -> torch.device:
        """Where the scores are; the CPU for a context that has none."""
        return next((tensor.device for _, tensor in self._named()), torch.device("cpu"))

    def score(self, kind: str, layer: int) -> Tensor:
        """`received` or `cls` attention of one layer, (T, N) float32."""
        scores: Mapping[int, Tensor] = getattr(self, kind)
        if layer not in scores:
            raise ContextError(
                f"the method needs {kind} attention of layer {layer}; the context holds "
                f"{sorted(scores) or 'none'}"
            )
        return scores[layer].float()

    def finite(self) -> tuple[list[str], Tensor]:
        """Names of all scores, and for each whether it is finite: (len(names),) bool, on device."""
        named = list(self._named())
        if not named:
            return [], torch.ones(0, dtype=torch.bool)
        # One look at all scores together; features are of another shape.
        scores = [t for _, t in named if t.ndim == 2]
        looks = [torch.stack(scores).isfinite().flatten(1).all(1)] if scores else []
        looks += [t.isfinite().all()[None] for _, t in named if t.ndim != 2]
        names = [n for n, t in named if t.ndim == 2] + [n for n, t in named if t.ndim != 2]
        return names, torch.cat(looks)

    def rows(self, index: Tensor, tiles: tuple[int, ...]) -> VisionContext:
        """The context of some of the tiles."""
        return dataclasses.replace(
            self,
            received={layer: s[index] for layer, s in self.received.items()},
            cls={layer: s[index] for layer, s in self.cls.items()},
            features=None if self.features is None else self.features[index],
            relevance=None if self.relevance is None else self.relevance[index],
            tiles=tiles,
        )


def raise_unless_finite(names: list[str], finite: Iterable[bool]) -> None:
    """Raise a ScoreError that names every score which is not finite."""
    bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
    if bad:
        raise ScoreError(
            f"{', '.join(bad)} not finite (inf or nan): the vision tower overflowed, as float16 "
            "towers do; run the tower in bfloat16 or float32"
        )


@dataclass(frozen=True)
class Selection:
    """Which patches stay.

    keep : (T, N) bool
    roles : role -> (T, N) bool; disjoint, and together equal to `keep`
    """

    keep: Tensor
    roles: dict[str, Tensor]

    @classmethod
    def of(cls, **roles: Tensor) -> Selection:
        """From disjoint role masks."""
        return cls(torch.stack(tuple(roles.values())).any(0), roles)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A training-free pruning method: a frozen set of options and one rule, `choose`.

    Parameters
    ----------
    r_max : upper bound on kept / N for each tile, in (0, 1]; 1 keeps all. 0.5 where no budget is
        given. It stands for round(r_max * N) patches, so that the bound holds up to this rounding
        (0.3 of 576 is 173 patches, 30.03 %), and for one patch at least.
    num_tokens : instead of `r_max`, patches in total for one image, shared evenly by its tiles
    patch_merge : "stock" packs LLaVA-NeXT tiles as the checkpoint says; "spatial" without unpad
        and newlines
    newline : mosaic rows that end in an image_newline: "rows" with a kept patch, "all" or "none"
    tower_attention : "sdpa" replaces the vision tower's eager attention by torch's fused one, as
        transformers before 4.46 has none (the same up to rounding, which in half precision moves
        choices between patches); "stock" leaves it, as the released codes do
    tower_dtype : "model" runs the tower in the dtype of the images, which is the language model's;
        "stock" in its own, float32 where LLaVA's scripts load a LLaVA-1.5

    With r_max=1 the tower is stock's whatever the two say.

    Raises
    ------
    OptionError : for an option out of its range
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    listed: ClassVar[bool] = True  # whether it can be had by its name

    r_max: float | None = None
    num_tokens: int | None = None
    patch_merge: str = "stock"
    newline: str = "rows"
    tower_attention: str = "sdpa"
    tower_dtype: str = "stock"

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
        choice(self, "patch_merge", ("stock", "spatial"))
        choice(self, "newline", ("rows", "all", "none"))
        choice(self, "tower_attention", ("sdpa", "stock"))
        choice(self, "tower_dtype", ("stock", "model"))

    def _has_budget(self) -> bool:
        return self.r_max is not None or self.num_tokens is not None

    @property
    def keeps_all(self) -> bool:
        """Whether the budget alone says that every patch stays."""
        return self.r_max == 1

    def needs(self, depth: int | None, select: int | None) -> Needs:
        """What to capture on an encoder of `depth` layers that hands on layer `select`.

        Raises LayerError for a layer out of range or past `select`. A budget that keeps every
        patch needs no scores.
        """
        needs = self.reads(depth, select)
        return Needs() if self.keeps_all else needs

    def reads(self, depth: int | None, select: int | None) -> Needs:
        """What `choose` reads; nothing by default."""
        return Needs()

    def check(self, grid: Grid) -> None:  # noqa: B027 - nothing to check is the usual case
        """Raise OptionError where these options cannot be met on a tile of this grid."""

    @abstractmethod
    def choose(self, context: VisionContext, budget: int) -> Selection:
        """The rule: at most `budget` < N patches of each tile. No transfer from the device."""

    def budget(self, patches: int, tiles: int = 1) -> int:
        """p_max, the patches that a tile may keep, of `patches`, in an image of `tiles` tiles."""
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
        ContextError, LayerError : the context lacks a layer, or the layer cannot exist
        ScoreError : scores that are not finite
        OptionError : a budget that the options cannot meet on this grid
        """
        names, finite = context.finite()
        raise_unless_finite(names, finite.tolist())
        return self.select_unchecked(context)

    def select_unchecked(self, context: VisionContext) -> Selection:
        """`select` without the look at the scores, which would wait for the device."""
        images = context.tiles or (context.total_tiles,)
        budgets = [self.budget(context.patches, tiles) for tiles in images]
        if len(set(budgets)) == 1:
            return self._select_at(context, budgets[0])
        # Images of different tile counts share num_tokens differently: one pass a budget.
        total, device = (context.total_tiles, context.patches), context.device
        merged = {role: torch.zeros(total, dtype=torch.bool, device=device) for role in self.roles}
        per_tile = torch.tensor(budgets).repeat_interleave(torch.tensor(images))
        for budget in sorted(set(budgets)):
            index = (per_tile == budget).nonzero().flatten().to(device)
            among = tuple(t for t, b in zip(images, budgets, strict=True) if b == budget)
            part = self._select_at(context.rows(index, among), budget)
            for role, mask in part.roles.items():
                merged[role][index] = mask
        return Selection.of(**merged)

    def _select_at(self, context: VisionContext, budget: int) -> Selection:
        self.check(context.grid)
        if budget < context.patches or not self._has_plain_budget():
            return self.choose(context, budget)
        total = (context.total_tiles, context.patches)
        none = torch.zeros(total, dtype=torch.bool, device=context.device)
        return Selection.of(**dict.fromkeys(self.roles, none) | {self.roles[0]: ~none})

    def _has_plain_budget(self) -> bool:
        """Whether a budget of N means that all is kept (not so for sizes given by hand)."""
        return True
