"""Checks that the methods share: options in range, layers that exist."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import ClassVar, Protocol

from llava_hvp.errors import ContextError, LayerError, OptionError, shown


class Named(Protocol):
    """What has options and a name to put before what is wrong with them: a Method, mostly."""

    name: ClassVar[str]


REFERENCE_DEPTH = 24  # the papers number the layers of CLIP ViT-L; other depths scale from it


def scaled_layers(
    layers: Iterable[int], depth: int | None, feature_layer: int | None
) -> tuple[int, ...]:
    """Default layers of a 24-layer encoder on one of `depth`, none past `feature_layer`."""
    depth, feature_layer = _geometry(depth, feature_layer)
    scaled = (max(1, round(layer * depth / REFERENCE_DEPTH)) for layer in layers)
    return tuple(dict.fromkeys(min(layer, feature_layer) for layer in scaled))


def checked_layers(
    layers: Iterable[int], depth: int | None, feature_layer: int | None, option: str
) -> tuple[int, ...]:
    """Layers given by hand, each in 1 .. `feature_layer`; raises LayerError."""
    depth, feature_layer = _geometry(depth, feature_layer)
    layers, valid = tuple(layers), f"give 1 to {feature_layer}"
    for layer in layers:
        if not 1 <= layer <= depth:
            raise LayerError(f"{option}: layer {shown(layer)} of an encoder of {depth}: {valid}")
        if layer > feature_layer:
            raise LayerError(
                f"{option}: layer {layer} lies past layer {feature_layer}, whose output LLaVA "
                f"uses: {valid}"
            )
    return layers


def next_layer(depth: int | None, feature_layer: int | None) -> int:
    """The layer after `feature_layer`, whose keys are made of its output; the last has none."""
    depth, feature_layer = _geometry(depth, feature_layer)
    return min(feature_layer + 1, depth)


def selected_layer(depth: int | None, feature_layer: int | None) -> int:
    """Layer `feature_layer`, where the encoder's geometry is known."""
    return _geometry(depth, feature_layer)[1]


def switch(options: Named, option: str) -> None:
    """Raise OptionError unless the option is True or False."""
    choice(options, option, (True, False))


def _geometry(depth: int | None, feature_layer: int | None) -> tuple[int, int]:
    if depth is None or feature_layer is None:
        raise ContextError(
            f"depth={depth!r}, feature_layer={feature_layer!r}: a method that reads layers needs "
            "both"
        )
    if not 1 <= feature_layer <= depth:
        raise LayerError(
            f"feature_layer={feature_layer} of an encoder of {depth} layers: give 1 to {depth}"
        )
    return depth, feature_layer


def number(
    options: Named, option: str, *, above: float = -math.inf, least: float = -math.inf, most: float
) -> None:
    """Raise OptionError unless the option is a number in the range."""
    value = getattr(options, option)
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (ok and value > above and least <= value <= most):
        start = f"({above}" if above > least else f"[{least}"
        raise OptionError(
            f"{options.name}: {option}={shown(value)}: give a number in {start}, {most}]"
        )


def integer(options: Named, option: str, *, least: int, most: int | None = None) -> None:
    """Raise OptionError unless the option is an integer of at least `least`, at most `most`."""
    value = getattr(options, option)
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < least or (most is not None and value > most):
        bounds = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise OptionError(f"{options.name}: {option}={shown(value)}: give an integer of {bounds}")


def choice(options: Named, option: str, valid: Iterable[object]) -> None:
    """Raise OptionError unless the option is one of `valid`."""
    value, valid = getattr(options, option), tuple(valid)
    if not any(type(value) is type(v) and value == v for v in valid):
        raise OptionError(
            f"{options.name}: {option}={shown(value)}: give one of {', '.join(map(str, valid))}"
        )


REFERENCE_DECODER_DEPTH = 32  # the papers number the layers of a 7B Llama


def scaled_decoder_layers(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Default layers of a 32-layer language model on one of `depth`: strictly rising, below it.

    Raises LayerError where it has too few.
    """
    layers, found = tuple(layers), list[int]()
    for place, layer in enumerate(layers):
        scaled = max(
            round(layer * depth / REFERENCE_DECODER_DEPTH), 1 + (found[-1] if found else 0)
        )
        found.append(min(scaled, depth - len(layers) + place))
    if found[0] < 1:
        raise LayerError(
            f"a language model of {depth} layers has no room for {len(layers)} drops between them"
        )
    return tuple(found)


def layer_numbers(options: Named, option: str) -> tuple[int, ...]:
    """An option that is a tuple of numbers from 1; raises OptionError."""
    value = getattr(options, option)
    ok = isinstance(value, (tuple, list)) and all(type(n) is int and n >= 1 for n in value)
    if not ok or not value:
        raise OptionError(f"{options.name}: {option}={shown(value)}: give a tuple of integers")
    return tuple(value)


def decoder_layers(layers: Iterable[int], depth: int, option: str) -> tuple[int, ...]:
    """Layers given by hand, strictly rising, each in 1 .. depth - 1; raises LayerError."""
    layers = tuple(layers)
    for layer in layers:
        if not 1 <= layer < depth:
            raise LayerError(
                f"{option}: layer {shown(layer)} of a language model of {depth}: give 1 to "
                f"{depth - 1}"
            )
    if any(b <= a for a, b in itertools.pairwise(layers)):
        raise LayerError(f"{option}: {shown(layers)}: give rising layer numbers")
    return layers
