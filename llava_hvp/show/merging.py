"""Where pruned patches went, of methods that merge states into the tokens that they send."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hvp.show.frame import Report

# Of a patch that flows into no token at a patch.
NOWHERE = -1


@dataclass(frozen=True)
class Merging:
    """What the tokens of an image hold besides their own patches; patches are `tile * N + patch`.

    Parameters
    ----------
    sent : Tensor
        (tiles * N,) bool, patches that are tokens themselves
    held : Tensor
        (tiles * N,) bool, patches that flow into a token which stands at no patch
    flows : tuple[tuple[int, Tensor], ...]
        each token that takes in other patches: where it stands, and they, ascending
    into : Tensor
        (tiles * N,) int64, for each pruned patch the token that it flows into with the largest
        weight, of equal ones the nearest on the picture; itself for such a token; else NOWHERE
    tokens, unplaced : int
        visual tokens sent, and how many of them stand at no patch
    """

    sent: Tensor
    held: Tensor
    flows: tuple[tuple[int, Tensor], ...]
    into: Tensor
    tokens: int
    unplaced: int

    @property
    def merged(self) -> Tensor:
        """(tiles * N,) bool, pruned patches that flow into a token at a patch."""
        return (self.into != NOWHERE) & ~self.sent

    @property
    def only_held(self) -> Tensor:
        """(tiles * N,) bool, pruned patches that are in tokens at no patch alone."""
        return self.held & ~self.merged & ~self.sent

    def __str__(self) -> str:
        """As `64 tokens, which carry 576 patches: 63 their own, 513 merged into 10 of them`.

        Tokens that stand at no patch are named: `64 tokens (1 at no patch), which carry …`.
        """
        parts = [f"{int(self.sent.sum())} their own"]
        if self.flows:
            parts.append(f"{int(self.merged.sum())} merged into {len(self.flows)} of them")
        if bool(self.only_held.any()):
            parts.append(f"{int(self.only_held.sum())} in what stands at none")
        carried = int((self.sent | self.merged | self.only_held).sum())
        unplaced = f" ({self.unplaced} at no patch)" if self.unplaced else ""
        return f"{self.tokens} tokens{unplaced}, which carry {carried} patches: {', '.join(parts)}"


def merging_of(report: Report) -> Merging | None:
    """None of a method that merges nothing."""
    mix, sent = report.selection.mix, report.sent
    if mix is None:
        return None
    patches = sent.shape[1]
    mixed = torch.tensor(mix.mixed or (True,) * len(sent))
    weights = mix.added[..., mix.added.shape[2] - patches :].float().cpu()
    weights = weights.masked_fill(~(sent & mixed[:, None])[..., None], 0)
    held = torch.zeros_like(sent)
    if mix.extra is not None:
        held = (mix.extra[:, mix.extra.shape[1] - patches :].cpu() != 0) & mixed[:, None]
    flows, into = [], torch.full((sent.numel(),), NOWHERE)
    for tile, own in enumerate(weights):
        first = tile * patches
        takers = own.ne(0).any(1).nonzero()[:, 0]
        if not len(takers):
            continue
        flows += [(first + int(t), first + own[t].nonzero()[:, 0]) for t in takers]
        chosen = _chosen(own[takers], _distances(takers, report.grid))
        pruned = own[takers].ne(0).any(0) & ~sent[tile]
        into[first : first + patches][pruned] = first + takers[chosen[pruned]]
        into[first + takers] = first + takers
    unplaced = sum(report.selection.extras)
    return Merging(sent.flatten(), held.flatten(), tuple(flows), into, report.kept_tokens, unplaced)


def _distances(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(tokens, N) squared distances of every patch of a tile from some."""
    index = torch.arange(grid[0] * grid[1])
    down, across = index // grid[1], index % grid[1]
    return (down - down[tokens, None]) ** 2 + (across - across[tokens, None]) ** 2


def _chosen(weights: Tensor, distances: Tensor) -> Tensor:
    """(N,) which of the tokens has a patch's largest weight, the nearest of equal ones."""
    most = weights == weights.max(0).values
    return distances.masked_fill(~most, distances.max() + 1).argmin(0)
