"""One AnyRes grid for every picture: `tiling="672"`, 2 x 2 tiles and the base tile.

A pruned model gets a config of its own for as long, in which `image_grid_pinpoints` is that grid
and all else the stock config's. LLaVA reads the grid from `model.config` wherever it cuts pictures
and packs them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from llava.model.llava_arch import LlavaMetaForCausalLM

from llava_hvp.errors import PrunedStateError, UnsupportedModelError

ACROSS = 2  # tiles, and as many down: 672 pixels of a tower of 336
TILES = 1 + ACROSS * ACROSS  # the base tile among them
STOCK = "stock"  # Runtime.tiling that leaves the checkpoint's own


class FixedGridConfig:
    """A model's config with one grid; whatever else is read or set is the stock config's.

    The stock config stays as it was, for models that share it, and is what `save_pretrained`,
    `to_dict` and a copy of the config by itself give. Before a config class among the bases.
    """

    __slots__ = ("fixed_grid", "stock_config")

    stock_config: Any
    fixed_grid: list[list[int]]

    def __init_subclass__(cls) -> None:
        """Keep transformers 5 from making a dataclass of it."""

    @property
    def image_grid_pinpoints(self) -> list[list[int]]:
        """The one (width, height), as LLaVA's config has a list of them."""
        return [list(size) for size in self.fixed_grid]

    @image_grid_pinpoints.setter
    def image_grid_pinpoints(self, value: Any) -> None:
        raise PrunedStateError(
            f"image_grid_pinpoints={value!r} on a model pruned with a tiling of its own, "
            f"{self.fixed_grid}: unprune(model) first"
        )

    def __reduce__(self) -> Any:
        # As it is: a loader's process gets the config alone, and cuts by the same grid.
        return _fixed, (self.stock_config, self.fixed_grid)

    def __copy__(self) -> Any:
        return copy.copy(self.stock_config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        stock = copy.deepcopy(self.stock_config, memo)
        # Of a config alone another model may be built, which nobody prunes.
        of_model = any(isinstance(each, LlavaMetaForCausalLM) for each in memo.values())
        return _fixed(stock, self.fixed_grid) if of_model else stock


@functools.cache
def _kind(stock: Any) -> Any:
    return type(stock.__name__, (FixedGridConfig, stock), {"__module__": stock.__module__})


def _fixed(stock: Any, grid: list[list[int]]) -> Any:
    of: Any = type(stock)
    config: Any = object.__new__(_kind(of))
    # One dict for both: what is set on either, as LLaVA's commands do, is set on both.
    object.__setattr__(config, "__dict__", vars(stock))
    object.__setattr__(config, "stock_config", stock)
    object.__setattr__(config, "fixed_grid", grid)
    return config


def fix(model: Any, tiling: str) -> None:
    """Give a model the config of a tiling; `release` gives the stock one back.

    Raises UnsupportedModelError for a model whose pictures are one tile.
    """
    if tiling == STOCK:
        return
    check_anyres(model.config, tiling)
    side = ACROSS * int(model.get_vision_tower().config.image_size)
    model.config = _fixed(model.config, [[side, side]])


def check_anyres(config: Any, tiling: str) -> None:
    """Raise UnsupportedModelError where a tiling cannot be had: pictures of one tile."""
    aspect = getattr(config, "image_aspect_ratio", None)
    if tiling != STOCK and aspect != "anyres":
        raise UnsupportedModelError(
            f"tiling={tiling!r} on a model with image_aspect_ratio={aspect!r}, which makes one "
            "tile of every picture: it is for LLaVA-NeXT (anyres), leave it out"
        )


def release(model: Any) -> None:
    """Give a model its stock config back, if it has another."""
    if isinstance(model.config, FixedGridConfig):
        model.config = model.config.stock_config


@contextlib.contextmanager
def fixed(model: Any, tiling: str) -> Iterator[None]:
    """Give an unpruned model the config of a tiling inside the block."""
    before = model.config
    fix(model, tiling)
    try:
        yield
    finally:
        model.config = before


def check_fixed(config: Any, tiling: str) -> None:
    """Raise UnsupportedModelError where a model no longer has the config of its tiling."""
    if tiling != STOCK and not isinstance(config, FixedGridConfig):
        raise UnsupportedModelError(
            f"the model was pruned with tiling={tiling!r}, and has another config now: leave "
            "model.config, or unprune(model) and prune it again"
        )


def check_tiles(tiles: tuple[int, ...], tiling: str) -> None:
    """Raise UnsupportedModelError for images that were cut by another grid.

    Parameters
    ----------
    tiles : tuple[int, ...]
        tiles of each image
    """
    others = [count for count in tiles if count != TILES]
    if tiling != STOCK and others:
        raise UnsupportedModelError(
            f"an image of {others[0]} tile{'s' * (others[0] != 1)}, where tiling={tiling!r} makes "
            f"{TILES} of every image: prune first, then cut pictures by LLaVA's "
            "process_images(images, image_processor, model.config)"
        )
