"""What the core asks of a framework and of its models; each folder of `llava_hvp.hosts` answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.encoding import PrunedEncoder
from llava_hvp.pruning.layout import Layout, Size
from llava_hvp.show.frame import View


class HostModel(Protocol):
    """One model of a host, as encoding, selecting and packing see it."""

    @property
    def model(self) -> Any:
        """The model itself."""

    @property
    def encoder(self) -> PrunedEncoder:
        """The vision tower; raises UnsupportedModelError where it is no pruned one any more."""

    def decoder_hooks(self) -> DecoderHooks:
        """Hooks on the language model, for methods inside it.

        Raises UnsupportedModelError where it cannot be pruned.
        """

    def layout(self, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens that the host would send of an image of `tiles` tiles.

        Parameters
        ----------
        size : Size | None
            (width, height) of the picture in pixels where known
        merge : str
            "stock", or "spatial" for several tiles with neither unpad nor newline
        """

    def mosaic(self, tiles: int, size: Size | None) -> Grid | None:
        """(down, across) of the tiles behind an image's first; None where tiles stand alone."""

    def padding(self, size: Size | None) -> Tensor:
        """(N,) bool, the patches of a tile that show nothing but the padding of a squared picture.

        Raises UnsupportedModelError where the host squares pictures and the size is unknown.
        """

    @property
    def projector(self) -> nn.Module:
        """What `project` runs."""

    def project(self, features: Tensor) -> Tensor:
        """(…, D) features of patches as the language model takes them."""

    def newline(self) -> Tensor:
        """(D,) the embedding that ends a row of the mosaic."""

    def view(self) -> View:
        """How the model sees pictures, to draw on one."""

    def prompts(self, rows: Sequence[Tensor], images: int, tokenizer: Any) -> list[str]:
        """What each image is asked: the last user turn of the row that it stands in.

        Parameters
        ----------
        rows : Sequence[Tensor]
            token ids of each row of the batch, without padding
        """

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens, D) input embeddings of the language model."""

    def load_tokenizer(self) -> Any:
        """The language model's own tokenizer; raises TextEncoderError where there is none."""

    @property
    def clip_checkpoint(self) -> str:
        """Name or folder of the tower's own checkpoint, which may hold CLIP's text encoder."""

    def detach(self) -> None:
        """Give the model back as it was; see `llava_hvp.unprune`."""
