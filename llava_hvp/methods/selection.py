"""What methods return: a Selection, and with which weights states flow into its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_hvp.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    Part = tuple[Tensor, "Mix | None"]  # index of some tiles, on the CPU, and their mix


@dataclass(frozen=True)
class Mix:
    """With which weights the states of layer `feature_layer` flow into the tokens that are sent.

    A state is one of the layer's S outputs: CLS, where the tower has one, and the N patches.

    Parameters
    ----------
    added : Tensor
        (T, N, S) float, what the token at each patch holds besides its own state
    extra : Tensor | None
        (T, S) float, one token more a tile, which stands at no patch; None for none
    rank : Tensor | None
        (T, N) integers, the order among a tile's loose tokens, lowest first; raster where None
    mixed : tuple[bool, ...] | None
        which tiles this is about; all where None. In the others every token is the state of its
        patch and stands in its place, and there is no extra one.
    """

    added: Tensor
    extra: Tensor | None = None
    rank: Tensor | None = None
    mixed: tuple[bool, ...] | None = None

    def apply(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (T, N, D) at the patches and extra ones (T, D), of the states (T, S, D).

        Sums are taken in float32 and given in the states' dtype. A patch into which nothing flows
        stays as it is, to the bit.
        """
        exact = states.float()
        own = exact[:, exact.shape[1] - self.added.shape[1] :]
        tokens = (own + self.added.float() @ exact).to(states.dtype)
        if self.extra is None:
            return tokens, None
        return tokens, (self.extra.float()[:, None] @ exact)[:, 0].to(states.dtype)

    @classmethod
    def joined(cls, parts: Iterable[Part], tiles: int) -> Mix | None:
        """One mix for `tiles` tiles, of a mix for some of them each; None where no part mixes."""
        found = [(index, mix) for index, mix in parts if mix is not None]
        if not found:
            return None
        mixed = [False] * tiles
        for index, mix in found:
            for tile, own in zip(index.tolist(), mix.mixed or (True,) * len(index), strict=True):
                mixed[tile] = own
        return cls(
            _scattered([(index, mix.added) for index, mix in found], tiles),
            _scattered_if_any([(index, mix.extra) for index, mix in found], tiles),
            _scattered_if_any([(index, mix.rank) for index, mix in found], tiles),
            None if all(mixed) else tuple(mixed),
        )


def _scattered(parts: Iterable[tuple[Tensor, Tensor]], tiles: int) -> Tensor:
    """Rows of the parts at their tiles, zeros elsewhere."""
    parts = list(parts)
    first = parts[0][1]
    whole = first.new_zeros(tiles, *first.shape[1:])
    for index, part in parts:
        whole[index.to(part.device)] = part
    return whole


def _scattered_if_any(parts: Iterable[tuple[Tensor, Tensor | None]], tiles: int) -> Tensor | None:
    given = [(index, part) for index, part in parts if part is not None]
    return _scattered(given, tiles) if given else None


@dataclass(frozen=True)
class Selection:
    """Which patches stay, and what else their tokens hold.

    Parameters
    ----------
    keep : Tensor
        (T, N) bool
    roles : dict[str, Tensor]
        role -> (T, N) bool; disjoint, and together equal to `keep`
    mix : Mix | None
        what flows into the tokens, and a tile's token without a patch; None where every token is
        the state of its patch
    """

    keep: Tensor
    roles: dict[str, Tensor]
    mix: Mix | None = None

    @classmethod
    def from_roles(cls, roles: dict[str, Tensor], mix: Mix | None = None) -> Selection:
        """From disjoint role masks."""
        return cls(torch.stack(tuple(roles.values())).any(0), roles, mix)

    @property
    def extras(self) -> tuple[bool, ...]:
        """For each tile, whether it sends a token that stands at no patch."""
        if self.mix is None or self.mix.extra is None:
            return (False,) * len(self.keep)
        return self.mix.mixed or (True,) * len(self.keep)

    def loose(self, roles: Iterable[str]) -> Tensor:
        """(T, N) mask of the tokens of these roles that follow their tile, off the mosaic."""
        chosen = [self.roles[role] for role in roles]
        if self.mix is None or not chosen:
            return torch.zeros_like(self.keep)
        mask = torch.stack(chosen).any(0)
        if self.mix.mixed is None:
            return mask
        return mask & torch.tensor(self.mix.mixed, device=mask.device)[:, None]
