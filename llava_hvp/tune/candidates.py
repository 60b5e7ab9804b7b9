"""Options that are worth trying of a method at a budget: from the default, coarse to fine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_hvp.checkpoints.variants import shared
from llava_hvp.errors import LlavaHvpError
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.methods.worth import Worth
from llava_hvp.runtime import INSIDE, PruningConfig, method_classes


@dataclass(frozen=True)
class Model:
    """What candidates are checked against: the shape of a tower and of a language model.

    Parameters
    ----------
    feature_layer : int
        the layer whose output goes on, numbered from 1
    decoder_layers : int
        of the language model
    """

    depth: int
    feature_layer: int
    grid: Grid
    decoder_layers: int

    def check(self, candidate: PruningConfig) -> None:
        """Raise a LlavaHvpError for options that this model cannot meet."""
        candidate.method.needs(self.depth, self.feature_layer)
        candidate.method.check(self.grid)
        if candidate.inside is not None:
            candidate.inside.check(self.decoder_layers)


@dataclass(frozen=True)
class Space:
    """What is worth trying of one method, or two that are joined, at one budget.

    Parameters
    ----------
    spec : str
        as `PruningConfig.of` takes it
    budget : dict[str, float | int]
        r_max or num_tokens, or none for the method's own
    fixed : dict[str, Any]
        options that are not tried, but given
    """

    spec: str
    budget: Mapping[str, float | int]
    model: Model
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def default(self) -> PruningConfig:
        """With no option but the fixed ones; raises a LlavaHvpError where that cannot be."""
        found = self._with({})
        self.model.check(found)
        return found

    def first(self) -> list[PruningConfig]:
        """The default, and the first look at all options that interact."""
        values = {name: worth.first(layers) for name, worth, layers in self._worths()}
        names = [name for name, found in values.items() if found]
        tried = [
            dict(zip(names, each, strict=True))
            for each in itertools.product(*(values[name] for name in names))
        ]
        return self._valid([{}, *tried])

    def near(self, ranked: Sequence[PruningConfig]) -> list[PruningConfig]:
        """Around the best: one option at a time.

        Parameters
        ----------
        ranked : Sequence[PruningConfig]
            what was tried, the best first
        """
        best = self._own(ranked[0])
        found = []
        for name, worth, layers in self._worths():
            default = self._own(ranked[0], default=True)[name]
            values = list(dict.fromkeys(self._own(each, default=True)[name] for each in ranked))
            for value in worth.near(best.get(name, default), values, layers):
                found.append({**best, name: value})
        return self._valid(found)

    def __str__(self) -> str:
        budget = " ".join(f"{name}={value}" for name, value in self.budget.items())
        return f"{self.spec} {budget}".strip()

    def _worths(self) -> Iterator[tuple[str, Worth, int]]:
        """Name, what is worth trying, and layers that it may name, of each option left open."""
        for number, kind in enumerate(method_classes(self.spec)):
            within = issubclass(kind, LanguageMethod)
            layers = self.model.decoder_layers - 1 if within else self.model.feature_layer
            for option, worth in kind.worth_trying.items():
                name = INSIDE * number + option
                if name not in self.fixed:
                    yield name, worth, layers

    def _own(self, candidate: PruningConfig, *, default: bool = False) -> dict[str, Any]:
        """Values of the options left open: those that were given, or all."""
        names = [name for name, _, _ in self._worths()]
        values = candidate.options if default else candidate.given
        return {name: values[name] for name in names if name in values}

    def _with(self, options: Mapping[str, Any]) -> PruningConfig:
        given = shared(self.spec, dict(self.budget), {**self.fixed, **options})
        return PruningConfig.of(self.spec, **given)

    def _valid(self, tried: Sequence[Mapping[str, Any]]) -> list[PruningConfig]:
        """Those that can be had on this model and budget, each once."""
        found: dict[str, PruningConfig] = {}
        for options in tried:
            try:
                candidate = self._with(options)
                self.model.check(candidate)
            except LlavaHvpError:
                continue
            found.setdefault(str(candidate), candidate)
        return list(found.values())
