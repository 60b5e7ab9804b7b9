"""The images of a call to Qwen2.5-VL, pruned: each selected on in its own grid of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.qwen.view import GridView
from llava_hvp.methods.base import Selection, VisionContext
from llava_hvp.pruning.encoding import on_cpu
from llava_hvp.pruning.packing import PackedImages
from llava_hvp.pruning.pruning import Pruning
from llava_hvp.pruning.report import ImageReport


class QwenImages:
    """The images of one call, not yet encoded.

    Parameters
    ----------
    pruning : Pruning
        of the model
    pixel_values : Tensor | None
        (patches, C), as the processor gives them
    beside : Mapping[str, Any]
        the call's arguments, `image_grid_thw` among them

    Attributes
    ----------
    columns : list[Tensor] | None
        (tokens,) int64 of each image, which of its placeholders stay, once encoded
    """

    def __init__(
        self, pruning: Pruning, pixel_values: Tensor | None, beside: Mapping[str, Any]
    ) -> None:
        self.pruning = pruning
        self.pixels = pixel_values
        self.stock: list[int] = []
        self.columns: list[Tensor] | None = None
        if pixel_values is None or len(pixel_values) == 0:
            return
        grids = beside.get("image_grid_thw")
        if grids is None:
            raise UnsupportedModelError(
                "pixel_values without image_grid_thw: pass on all that the processor gives"
            )
        self.grids: Tensor = torch.as_tensor(grids)
        if int(self.grids.prod(1).sum()) != len(pixel_values) or bool(
            (self.grids[:, 0] != 1).any()
        ):
            raise UnsupportedModelError(
                f"pixel_values of {len(pixel_values)} patches for image_grid_thw="
                f"{self.grids.tolist()}: give images, each 1 x rows x columns, as the processor "
                "gives them together"
            )
        encoder: Any = pruning.host_model.encoder
        merged = encoder.vit.config.spatial_merge_size**2
        self.stock = (self.grids.prod(1) // merged).tolist()

    def packed(
        self, which: Sequence[int], rows: list[Tensor] | None, dtype: torch.dtype
    ) -> PackedImages:
        """All images, at least one, pruned."""
        assert self.pixels is not None
        encoder: Any = self.pruning.host_model.encoder
        tokens, contexts = encoder.see(self.pixels, self.grids)
        selections = [self._select(context) for context in contexts]
        self.columns = [selection.keep[0].nonzero()[:, 0] for selection in selections]
        side = encoder.vit.config.patch_size * encoder.vit.config.spatial_merge_size
        reports = [
            ImageReport(
                self.pruning.method.name,
                1,
                count,
                len(columns),
                selection.keep,
                context.grid,
                None,
                selection,
                view=GridView(context.grid, side),
                pruned_by=str(self.pruning.config),
            )
            for count, columns, context, selection in zip(
                self.stock, self.columns, contexts, selections, strict=True
            )
        ]
        features = [
            states if len(columns) == len(states) else states[columns.to(states.device)]
            for states, columns in zip(tokens, self.columns, strict=True)
        ]
        pruned = any(report.kept_tokens < report.stock_tokens for report in reports)
        return PackedImages(features, pruned, reports, self.columns)

    @torch.no_grad()
    def _select(self, context: VisionContext) -> Selection:
        method = self.pruning.method
        selection = method.select_unchecked(context)
        if selection.mix is not None:
            raise UnsupportedModelError(
                f"{method.name} merges tokens, which is not done for Qwen2.5-VL: use one that "
                "selects, as hiprune"
            )
        return on_cpu(selection, *context.finite())
