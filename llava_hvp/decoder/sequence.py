"""The tokens that enter a stretch of decoder layers, and how they become fewer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Level:
    """B rows of n tokens, from one decoder layer on. Every row ends at the right.

    A row with fewer tokens than another begins with columns that nobody sees.

    Parameters
    ----------
    layer : int
        the first layer that they enter
    columns : Tensor
        (B, n) int64, columns of the prompt; of a merged token that of the one that it was made at
    merged : Tensor
        (B, n) bool, tokens made of several
    visual, valid : Tensor
        (B, n) bool, as in Prompt; merged tokens are visual
    positions : Tensor
        (B, n) int64, that RoPE turns them by
    counts : tuple[int, ...]
        visual tokens of each row
    lengths : tuple[int, ...]
        valid tokens of each row
    """

    layer: int
    columns: Tensor
    merged: Tensor
    visual: Tensor
    valid: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Columns of a row, n."""
        return int(self.valid.shape[1])

    @property
    def ragged(self) -> bool:
        """Whether some columns are nobody's."""
        return any(length != self.length for length in self.lengths)


@dataclass(eq=False)
class Generation:
    """What the cache of a generation remembers of its prompt.

    Parameters
    ----------
    length : int
        columns of the prompt
    renumbers : bool
        whether positions close up after a drop
    levels : list[Level]
        from the first layer on
    """

    length: int
    renumbers: bool
    levels: list[Level] = field(default_factory=list)

    def at(self, layer: int) -> Level:
        """The tokens that enter a layer."""
        return next(level for level in reversed(self.levels) if level.layer <= layer)

    def gone(self, level: Level) -> Tensor:
        """(B, 1) int64, tokens of each row dropped before a level."""
        pairs = zip(self.levels[0].lengths, level.lengths, strict=True)
        counts = [[before - now] for before, now in pairs]
        return torch.tensor(counts, device=level.valid.device)


@dataclass(eq=False)
class MergedTokens:
    """What is put in behind the last visual token of each row.

    Parameters
    ----------
    states : Tensor
        (B, M, D), hidden states
    valid : Tensor
        (B, M) bool, of a row with fewer only the first
    columns : Tensor
        (B, M) int64, as in Level
    counts : tuple[int, ...]
        of each row
    """

    states: Tensor
    valid: Tensor
    columns: Tensor
    counts: tuple[int, ...]


def drop(
    level: Level,
    states: Tensor,
    kept: Tensor,
    kept_counts: tuple[int, ...],
    layer: int,
    merged: MergedTokens | None,
    tails: tuple[int, ...],
) -> tuple[Level, Tensor, Tensor]:
    """The next level, positions as before, its states, and the columns of this one, (B, n').

    Parameters
    ----------
    states : Tensor
        (B, n, D)
    kept : Tensor
        (B, n) bool, the visual tokens that stay
    kept_counts : tuple[int, ...]
        how many those are in each row
    layer : int
        the first layer of the next level
    tails : tuple[int, ...]
        tokens behind the last visual one of each row
    """
    stays = (level.valid & ~level.visual) | kept
    extra = (0,) * len(tails) if merged is None else merged.counts
    counts = tuple(a + b for a, b in zip(kept_counts, extra, strict=True))
    texts = (length - now for length, now in zip(level.lengths, level.counts, strict=True))
    lengths = tuple(text + now for text, now in zip(texts, counts, strict=True))
    order = torch.arange(level.length, device=states.device).expand(stays.shape)
    columns, is_merged, visual, positions = (
        level.columns,
        level.merged,
        level.visual,
        level.positions,
    )
    if merged is not None:
        width = merged.valid.shape[1]
        behind = torch.tensor([level.length - tail - 1 for tail in tails], device=states.device)
        made = behind[:, None] * (width + 1) + 1 + torch.arange(width, device=states.device)
        order = torch.cat((order * (width + 1), made), dim=1)
        stays = torch.cat((stays, merged.valid), dim=1)
        states = torch.cat((states, merged.states), dim=1)
        columns = torch.cat((columns, merged.columns), dim=1)
        is_merged = torch.cat((is_merged, torch.ones_like(merged.valid)), dim=1)
        visual = torch.cat((visual, torch.ones_like(merged.valid)), dim=1)
        positions = torch.cat((positions, positions.new_zeros(merged.valid.shape)), dim=1)
    # What goes comes first, so that every row keeps its end at the right.
    source = torch.where(stays, order, -1).argsort(dim=1, stable=True)[:, -max(lengths) :]

    def taken(values: Tensor) -> Tensor:
        return values.gather(1, source)

    valid = taken(stays)
    level = Level(
        layer,
        taken(columns),
        taken(is_merged) & valid,
        taken(visual) & valid,
        valid,
        taken(positions),
        counts,
        lengths,
    )
    states = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
    return level, states, source


def renumbered(level: Level, end: Tensor, gone: Tensor) -> Tensor:
    """(B, n) int64, positions without gaps; the last token moves up by all that were dropped.

    Parameters
    ----------
    end, gone : Tensor
        (B, 1) int64, position of the last token before any drop, and tokens dropped since
    """
    steps = torch.arange(1 - level.length, 1, device=end.device)
    return (end - gone + steps).clamp(min=0)
