"""Several methods that read one run of a vision tower, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from llava_hvp.encoder.capture import AttentionScores
from llava_hvp.methods.base import Needs
from llava_hvp.pruning.encoding import PrunedEncoder


def together(needs: Iterable[Needs]) -> Needs:
    """What one run records for methods of all these needs; all else is made of its output."""
    wanted = list(needs)

    def layers(name: str) -> tuple[int, ...]:
        return tuple(sorted({layer for each in wanted for layer in getattr(each, name)}))

    return Needs(
        received_attention=layers("received_attention"),
        cls_attention=layers("cls_attention"),
        keys=layers("keys"),
        queries=layers("queries"),
    )


class SharedRuns:
    """What a tower gave for one batch of pictures, for every method that is put on it.

    Parameters
    ----------
    needs : Needs
        what the methods read, as `together` gives it; another one's reading makes a run of its own
    """

    def __init__(self, needs: Needs | None = None) -> None:
        self.needs = needs or Needs()
        self._seen: dict[Any, tuple[Tensor, AttentionScores]] = {}

    @contextlib.contextmanager
    def on(self, encoder: PrunedEncoder) -> Iterator[None]:
        """Inside the block the encoder of a pruned model runs at most once for the batch."""
        stock = encoder.run_to_layer

        def run_to_layer(images: Tensor) -> tuple[Tensor, AttentionScores]:
            own = together([encoder.plan().needs])
            needs = self.needs if together([own, self.needs]) == self.needs else own
            # What keeps all runs as stock does, and a tower in another dtype gives other numbers.
            key = needs, encoder.fuses_attention, encoder.dtype
            if key not in self._seen:
                self._seen[key] = stock(images, needs)
            hidden, scores = self._seen[key]
            return hidden, _only(scores, own)

        encoder.run_to_layer = run_to_layer  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            del encoder.run_to_layer


def _only(scores: AttentionScores, needs: Needs) -> AttentionScores:
    """The scores that a method asked for: others' may not be finite."""
    chosen = {
        field.name: {
            layer: tensor
            for layer, tensor in getattr(scores, field.name).items()
            if layer in getattr(needs, field.name)
        }
        for field in fields(AttentionScores)
    }
    return AttentionScores(**chosen)
