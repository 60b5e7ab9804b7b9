"""Which values of an option are worth trying where nobody knows the best one: for `llava-hvp tune`.

A method names them once for all towers, in its `worth_trying`; here they become numbers for one of
so many layers. First a few values of everything that interacts, then more around the best.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 12  # layers of a first look
BEST = 3  # layers alone that sets are made of


class Worth(ABC):
    """Values of one option."""

    @abstractmethod
    def first(self, layers: int) -> tuple[Any, ...]:
        """What is tried together with every first value of the other options; () for the default.

        Parameters
        ----------
        layers : int
            that can be read, numbered from 1
        """

    @abstractmethod
    def near(self, best: Any, ranked: Sequence[Any], layers: int) -> tuple[Any, ...]:
        """What is tried next, one at a time, all other options being the best's.

        Parameters
        ----------
        best : Any
            the best value so far; None for a default that depends on the tower
        ranked : Sequence[Any]
            values that were tried, the best first
        """


WorthTrying = Mapping[str, Worth]  # by option


@dataclass(frozen=True)
class Values(Worth):
    """Some values, whatever the tower.

    Parameters
    ----------
    values : tuple[Any, ...]
        all of them
    together : tuple[Any, ...]
        those that a first look tries together with other options
    """

    values: tuple[Any, ...]
    together: tuple[Any, ...] = ()

    def first(self, layers: int) -> tuple[Any, ...]:
        return self.together

    def near(self, best: Any, ranked: Sequence[Any], layers: int) -> tuple[Any, ...]:
        return tuple(value for value in self.values if value != best)


@dataclass(frozen=True)
class OneLayer(Worth):
    """A layer: first some from the first to the last, then the neighbours of the best."""

    def first(self, layers: int) -> tuple[int, ...]:
        return spread_layers(layers)

    def near(self, best: Any, ranked: Sequence[Any], layers: int) -> tuple[int, ...]:
        return () if best is None else _beside(best, layers)


@dataclass(frozen=True)
class LayerSet(Worth):
    """Layers whose scores are averaged: first each alone, then the best ones with each other."""

    def first(self, layers: int) -> tuple[tuple[int, ...], ...]:
        return tuple((layer,) for layer in spread_layers(layers))

    def near(self, best: Any, ranked: Sequence[Any], layers: int) -> tuple[tuple[int, ...], ...]:
        alone = [value[0] for value in ranked if value is not None and len(value) == 1][:BEST]
        sets: list[set[int]] = []
        for place, layer in enumerate(alone):
            sets += [{layer, other} for other in alone[:place]]
        if alone:
            sides = _beside(alone[0], layers)
            sets += [{side} for side in sides] + [{alone[0], side} for side in sides]
            sets += [{alone[0], *sides}, set(alone)]
        if best is not None and len(best) > 1:
            sides = _beside(min(best), layers)[:1] + _beside(max(best), layers)[-1:]
            sets += [{*best, side} for side in sides] + [{*best} - {layer} for layer in best]
        found = dict.fromkeys(tuple(sorted(each)) for each in sets)
        return tuple(each for each in found if each != best)


def spread_layers(layers: int) -> tuple[int, ...]:
    """At most twelve of the layers 1 to `layers`, evenly, the last among them."""
    step = -(-layers // MOST)
    return tuple(range(layers, 0, -step))[::-1]


def _beside(layer: int, layers: int) -> tuple[int, ...]:
    return tuple(other for other in (layer - 1, layer + 1) if 1 <= other <= layers)
