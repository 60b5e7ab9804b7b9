"""What methods read: Needs says what is captured, VisionContext holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_hvp.errors import ContextError, ScoreError
from llava_hvp.lazy import torch
from llava_hvp.methods.masks import Grid

if TYPE_CHECKING:
    from torch import Tensor

# Of one entry a layer; of one tensor for all tiles.
_BY_LAYER = ("received_attention", "cls_attention", "keys", "queries")
_BY_TILE = ("features", "projected", "relevance", "padding")
_FORMS = {"features": ", D", "projected": ", P"}


@dataclass(frozen=True)
class Needs:
    """What a method reads. Nothing else is captured.

    Layers are numbered from 1. `keys` and `queries` may name layer `feature_layer + 1`: they are
    made of the output of layer `feature_layer`, and that layer is not run. `relevance` names the
    text side ("clip" or "llm"), or is None. The others are named as in VisionContext.
    """

    received_attention: tuple[int, ...] = ()
    cls_attention: tuple[int, ...] = ()
    features: bool = False
    relevance: str | None = None
    keys: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    projected: bool = False
    words: bool = False
    padding: bool = False
    mosaics: bool = False


@dataclass(frozen=True)
class VisionContext:
    """What the vision encoder saw on T tiles of N patches.

    Parameters
    ----------
    grid : Grid
        (rows, columns) of patches; N = rows * columns
    received_attention : Mapping[int, Tensor]
        layer -> (T, N) float, the attention each patch receives (mean over heads and over all query
        rows, CLS row included, CLS column dropped)
    depth : int | None
        layers of the encoder
    feature_layer : int | None
        the layer whose output goes to the projector, numbered from 1
    cls_attention : Mapping[int, Tensor]
        layer -> (T, N) float, the attention that CLS pays to each patch (mean over heads)
    features : Tensor | None
        (T, N, D) float, the output of layer `feature_layer`
    relevance : Tensor | None
        (T, N) float, how related each patch is to the prompt
    tiles : tuple[int, ...] | None
        tiles of each image, in order; the T tiles are one image by default
    keys, queries : Mapping[int, Tensor]
        layer -> (T, S, D) float, the output of k_proj and q_proj, bias included and heads side by
        side; S = N, or 1 + N with CLS first where the tower has one
    heads : int | None
        of each layer of the encoder
    projected : Tensor | None
        (T, N, P) float, every patch after the projector
    words : tuple[Tensor, ...] | None
        one (M, P) float an image, the language model's input embeddings of its prompt's words
    padding : Tensor | None
        (T, N) bool, patches that show nothing but padding
    mosaics : tuple[Grid | None, ...] | None
        (down, across) of each image's tiles behind the first, which shows all of it; None for an
        image whose tiles stand alone

    Raises
    ------
    ContextError
        where shapes disagree
    """

    grid: Grid
    received_attention: Mapping[int, Tensor] = field(default_factory=dict)
    depth: int | None = None
    feature_layer: int | None = None
    cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    relevance: Tensor | None = None
    tiles: tuple[int, ...] | None = None
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    heads: int | None = None
    projected: Tensor | None = None
    words: tuple[Tensor, ...] | None = None
    padding: Tensor | None = None
    mosaics: tuple[Grid | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ContextError(f"grid={self.grid!r}: give (rows, columns), both at least 1")
        if self.tiles is not None and (not self.tiles or min(self.tiles) < 1):
            raise ContextError(f"tiles={self.tiles!r}: give the number of tiles of each image")
        for name, tensor in self._of_tiles():
            self._check_shape(name, tensor)
        if self.padding is not None and self.padding.dtype != torch.bool:
            raise ContextError(f"padding is {self.padding.dtype}: give a mask of torch.bool")
        self._check_heads()
        self._check_images()

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        patches, shape = self.patches, tuple(tensor.shape)
        rest = f"{patches}{_FORMS.get(name, '')}"
        widths = [patches]
        if name.startswith(("keys", "queries")):
            rest = f"{patches} or with CLS {patches + 1}, D"
            widths.append(patches + 1)
        on_grid = f"on a grid of {self.grid[0]} x {self.grid[1]} need"
        dims = 3 if rest.endswith(("D", "P")) else 2
        if len(shape) != dims and self.tiles is None:
            # How many tiles there are cannot be read from such a shape.
            raise ContextError(
                f"{name} has shape {shape}: T tiles {on_grid} (T, {rest}), one tile (1, {rest})"
            )
        if len(shape) != dims or shape[0] != self.total_tiles or shape[1] not in widths:
            raise ContextError(
                f"{name} has shape {shape}: {self.total_tiles} tiles {on_grid} "
                f"({self.total_tiles}, {rest})"
            )

    def _check_heads(self) -> None:
        widths = {tensor.shape[2] for tensor in (*self.keys.values(), *self.queries.values())}
        if self.heads is None or (self.heads > 0 and not any(w % self.heads for w in widths)):
            return
        raise ContextError(
            f"heads={self.heads!r}: give a number that divides the width of keys and queries"
            f"{''.join(f', {width}' for width in sorted(widths))}"
        )

    def _check_images(self) -> None:
        for name, entries in (("words", self.words), ("mosaics", self.mosaics)):
            if entries is not None and len(entries) != len(self.images):
                raise ContextError(
                    f"{name} has {len(entries)} entries: {len(self.images)} images need one each"
                )
        for words in self.words or ():
            if words.ndim != 2 or (
                self.projected is not None and words.shape[1] != self.projected.shape[2]
            ):
                width = "P" if self.projected is None else self.projected.shape[2]
                raise ContextError(
                    f"words has an entry of shape {tuple(words.shape)}: give (M, {width}), a row "
                    "a word as wide as a projected patch"
                )
        for tiles, mosaic in zip(self.images, self.mosaics or (), strict=False):
            if mosaic is not None and (min(mosaic) < 1 or 1 + mosaic[0] * mosaic[1] != tiles):
                raise ContextError(
                    f"mosaics has {mosaic!r} for an image of {tiles} tiles: give (down, across) "
                    "of the tiles behind the first, or None where tiles stand alone"
                )

    def _of_tiles(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors whose first dimension is T."""
        for name in _BY_LAYER:
            yield from ((f"{name}[{layer}]", s) for layer, s in getattr(self, name).items())
        for name in _BY_TILE:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @property
    def patches(self) -> int:
        """N, the patches of a tile."""
        return self.grid[0] * self.grid[1]

    @property
    def total_tiles(self) -> int:
        """T, the tiles of all images together."""
        if self.tiles is not None:
            return sum(self.tiles)
        return next((tensor.shape[0] for _, tensor in self._of_tiles()), 1)

    @property
    def images(self) -> tuple[int, ...]:
        """Tiles of each image; one image of all tiles where `tiles` is not given."""
        return self.tiles or (self.total_tiles,)

    @property
    def device(self) -> torch.device:
        """Where the scores are; the CPU for a context that has none."""
        return next((tensor.device for _, tensor in self._of_tiles()), torch.device("cpu"))

    def score(self, kind: str, layer: int) -> Tensor:
        """`received` or `cls` attention of one layer (T, N), or its `keys` or `queries` (T, S, D).

        In float32.
        """
        scores: Mapping[int, Tensor] = getattr(self, kind)
        if layer not in scores:
            what = f"{kind} attention" if kind in ("received_attention", "cls_attention") else kind
            raise ContextError(
                f"the method needs {what} of layer {layer}; the context holds "
                f"{sorted(scores) or 'none'}"
            )
        return scores[layer].float()

    def read(self, name: str, method: str) -> Tensor:
        """`features`, `projected` or `relevance` in float32, for a method of this name."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            shape = f"(T, N{_FORMS.get(name, '')})"
            raise ContextError(f"{method} needs {name} {shape} in the context: it has none")
        return tensor.float()

    def finite(self) -> tuple[list[str], Tensor]:
        """Names of all scores, and for each whether it is finite: (len(names),) bool, on device."""
        named = [(n, t) for n, t in self._of_tiles() if t.is_floating_point()]
        named += [(f"words[{i}]", words) for i, words in enumerate(self.words or ())]
        if not named:
            return [], torch.ones(0, dtype=torch.bool)
        # One look at all scores together; all else is of another shape.
        shape = (self.total_tiles, self.patches)
        scores = [(n, t) for n, t in named if t.shape == shape]
        others = [(n, t) for n, t in named if t.shape != shape]
        looks = [torch.stack([t for _, t in scores]).isfinite().flatten(1).all(1)] if scores else []
        looks += [t.isfinite().all()[None] for _, t in others]
        return [n for n, _ in scores + others], torch.cat([look.to(self.device) for look in looks])

    def rows(self, index: Tensor, tiles: tuple[int, ...]) -> VisionContext:
        """The context of some of the tiles.

        Parameters
        ----------
        index : Tensor
            of the tiles, on the CPU
        tiles : tuple[int, ...]
            tiles of each image among them
        """
        on_device = index.to(self.device)
        images = self._images_of(index, tiles)
        changes: dict[str, object] = {}
        for name in _BY_LAYER:
            changes[name] = {layer: s[on_device] for layer, s in getattr(self, name).items()}
        for name in _BY_TILE:
            tensor: Tensor | None = getattr(self, name)
            changes[name] = None if tensor is None else tensor[on_device]
        for name in ("words", "mosaics"):
            entries: tuple[object, ...] | None = getattr(self, name)
            changes[name] = None if entries is None else tuple(entries[i] for i in images)
        return dataclasses.replace(self, **changes, tiles=tiles)  # type: ignore[arg-type]

    def _images_of(self, index: Tensor, tiles: tuple[int, ...]) -> list[int]:
        """The image that each of the groups `tiles` of the tiles `index` comes from."""
        owner = [image for image, count in enumerate(self.images) for _ in range(count)]
        starts = [sum(tiles[:group]) for group in range(len(tiles))]
        return [owner[int(index[start])] for start in starts]


def raise_unless_finite(names: list[str], finite: Iterable[bool]) -> None:
    """Raise a ScoreError that names every score which is not finite."""
    bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
    if bad:
        raise ScoreError(
            f"{', '.join(bad)} not finite (inf or nan): the vision tower overflowed, as float16 "
            "towers do; run the tower in bfloat16 or float32"
        )
