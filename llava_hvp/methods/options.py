"""Checks that the methods share: options in range, layers that exist."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llava_hvp.errors import ContextError, LayerError, OptionError

if TYPE_CHECKING:
    from llava_hvp.methods.base import Method

REFERENCE_DEPTH = 24  # the papers number the layers of CLIP ViT-L; other depths scale from it


def scaled_layers(layers: Iterable[int], depth: int | None, select: int | None) -> tuple[int, ...]:
    """Default layers of a 24-layer encoder on one of `depth` layers, none deeper than `select`."""
    depth, select = _geometry(depth, select)
    scaled = (max(1, round(layer * depth / REFERENCE_DEPTH)) for layer in layers)
    return tuple(dict.fromkeys(min(layer, select) for layer in scaled))


def checked_layers(
    layers: Iterable[int], depth: int | None, select: int | None, option: str
) -> tuple[int, ...]:
    """Layers given by hand, each in 1 .. `select`; raises LayerError."""
    depth, select = _geometry(depth, select)
    layers = tuple(layers)
    for layer in layers:
        if not 1 <= layer <= depth:
            raise LayerError(
                f"{option}: layer {layer} of an encoder of {depth}: give 1 to {select}"
            )
        if layer > select:
            raise LayerError(
                f"{option}: layer {layer} lies past layer {select}, whose output LLaVA uses: "
                f"give 1 to {select}"
            )
    return layers


def next_layer(depth: int | None, select: int | None) -> int:
    """The layer after `select`, whose keys are made of `select`'s output; the last has none."""
    depth, select = _geometry(depth, select)
    return min(select + 1, depth)


def selected_layer(depth: int | None, select: int | None) -> int:
    """Layer `select`, where the encoder's geometry is known."""
    return _geometry(depth, select)[1]


def switch(method: Method, option: str) -> None:
    """Raise OptionError unless the option is True or False."""
    choice(method, option, (True, False))


def _geometry(depth: int | None, select: int | None) -> tuple[int, int]:
    if depth is None or select is None:
        raise ContextError(
            f"depth={depth!r}, select={select!r}: a method that reads layers needs both"
        )
    if not 1 <= select <= depth:
        raise LayerError(f"select={select} of an encoder of {depth} layers: give 1 to {depth}")
    return depth, select


def number(
    method: Method, option: str, *, above: float = -math.inf, least: float = -math.inf, most: float
) -> None:
    """Raise OptionError unless the option is a number in the range."""
    value = getattr(method, option)
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (ok and value > above and least <= value <= most):
        start = f"({above}" if above > least else f"[{least}"
        raise OptionError(f"{method.name}: {option}={value!r}: give a number in {start}, {most}]")


def integer(method: Method, option: str, *, least: int) -> None:
    """Raise OptionError unless the option is an integer of at least `least`."""
    value = getattr(method, option)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{method.name}: {option}={value!r}: give an integer of at least {least}")


def choice(method: Method, option: str, valid: Iterable[object]) -> None:
    """Raise OptionError unless the option is one of `valid`."""
    value, valid = getattr(method, option), tuple(valid)
    if not any(type(value) is type(v) and value == v for v in valid):
        raise OptionError(
            f"{method.name}: {option}={value!r}: give one of {', '.join(map(str, valid))}"
        )
