"""Shapes of the published LLaVA models, without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_hvp.errors import OptionError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Vision:
    """A CLIP vision encoder, of which LLaVA uses the output of layer `select`.

    Parameters
    ----------
    select : int
        numbered from 1; layers past it need not run
    """

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image: int = 336
    patch: int = 14
    select: int = 23

    @property
    def patches(self) -> int:
        """N, the patches of a tile."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Language:
    """A Llama or Mistral decoder."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 11008
    vocab: int = 32000

    @property
    def is_mistral(self) -> bool:
        """Whether several heads share keys and values, as in Mistral."""
        return self.kv_heads != self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: q and o, k and v, gate, up and down."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.mlp


@dataclass(frozen=True)
class LlavaGeometry:
    """A LLaVA model.

    Parameters
    ----------
    tiles : int
        that the encoder sees of one image: 1, or the most that AnyRes makes
    """

    name: str
    vision: Vision
    language: Language
    tiles: int

    @property
    def is_next(self) -> bool:
        """Whether it cuts pictures into AnyRes tiles."""
        return self.tiles > 1


_13B = Language(hidden=5120, layers=40, heads=40, kv_heads=40, mlp=13824)
_MISTRAL = Language(kv_heads=8, mlp=14336)
# For a CPU: the real tower before a Llama of 160 M, and one of a size for tests.
_160M = Language(hidden=768, layers=12, heads=12, kv_heads=12, mlp=3072)
_TINY_VISION = Vision(hidden=64, layers=12, heads=4, mlp=128, image=112, select=11)
_TINY = Language(hidden=64, layers=2, heads=4, kv_heads=4, mlp=128, vocab=1000)
_GEOMETRIES = (
    LlavaGeometry("llava-1.5-7b", Vision(), Language(), 1),
    LlavaGeometry("llava-1.5-13b", Vision(), _13B, 1),
    LlavaGeometry("llava-next-7b", Vision(), Language(), 5),
    LlavaGeometry("llava-next-mistral-7b", Vision(), _MISTRAL, 5),
    LlavaGeometry("llava-1.5-160m", Vision(), _160M, 1),
    LlavaGeometry("llava-next-160m", Vision(), _160M, 5),
    LlavaGeometry("llava-1.5-tiny", _TINY_VISION, _TINY, 1),
    LlavaGeometry("llava-next-tiny", _TINY_VISION, _TINY, 5),
)


def list_geometries() -> list[str]:
    """Names of all geometries."""
    return [geometry.name for geometry in _GEOMETRIES]


def get_geometry(name: str) -> LlavaGeometry:
    """A geometry by name; raises OptionError with the valid names."""
    for geometry in _GEOMETRIES:
        if geometry.name == name:
            return geometry
    raise OptionError(f"unknown geometry {name!r}: give one of {', '.join(list_geometries())}")


def shapes_of(
    vit: nn.Module, select_layer: int, model: Any, name: str, tiles: int
) -> LlavaGeometry:
    """The shapes of a model of either host, whose vision transformer this is."""
    vision: Any = vit.config
    config = getattr(model.config, "text_config", model.config)
    layers = vision.num_hidden_layers
    select = select_layer if select_layer >= 0 else layers + 1 + select_layer
    return LlavaGeometry(
        name,
        Vision(
            hidden=vision.hidden_size,
            layers=layers,
            heads=vision.num_attention_heads,
            mlp=vision.intermediate_size,
            image=vision.image_size,
            patch=vision.patch_size,
            select=select,
        ),
        Language(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
        ),
        tiles,
    )
