"""The vision tower of Qwen2.5-VL with a method: stock runs it, what is wanted is read from beside.

A token is 2 x 2 patches, and its score their mean, so that a method sees a grid of tokens, which
each image has of its own size. No patch can go before the merger.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.hf.qwen.capture import QKVHooks, recording
from llava_hvp.methods.base import Needs, VisionContext, VisionMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.switch import Switch, Switched
from llava_hvp.runtime import PruningConfig

_CHANGING = threading.Lock()


@dataclass(frozen=True)
class QwenPlan:
    """What a method reads of a tower.

    Parameters
    ----------
    depth : int
        layers of the tower; the last one's output goes on
    full : dict[int, int]
        a layer that the method asks -> the one with full attention that is read for it
    """

    depth: int
    needs: Needs
    full: dict[int, int]


class QwenTower(Switched):
    """What runs the tower of one model instead of its own `get_image_features`.

    In most layers a patch attends to its window only, which gives every window the same mass: such
    scores cannot be compared across an image. So of a windowed layer the nearest one with full
    attention is read instead, of two equally near ones the later. HiPrune's default then is layer
    16 of 32, as in its released code; of HIVTP's 7 to 10 of 24 there remain 8 and 16, and no source
    says what its layers should be on this tower.

    Parameters
    ----------
    inner : Any
        a Qwen2_5_VLModel
    pruning : PruningConfig
        the method, and how to run it
    """

    def __init__(self, inner: Any, pruning: PruningConfig) -> None:
        self.inner = inner
        self.prune_switch = Switch(pruning)
        self._hooks = QKVHooks()
        self.check(pruning.method)
        self.check_tower(pruning)
        self.plan()

    @property
    def vit(self) -> Any:
        """The vision transformer, as it is now."""
        return self.inner.visual

    def plan(self) -> QwenPlan:
        """What to read of the tower by the method in force, hooks in place.

        They are set anew where loading has replaced the modules that they sat on.
        """
        blocks = self.vit.blocks
        needs = self.prune_method.needs(len(blocks), len(blocks))
        full = {layer: self._nearest(layer) for layer in needs.received_attention}
        with _CHANGING:
            if not self._hooks.on(blocks):
                self._hooks.remove()
            self._hooks.cover(blocks, sorted(set(full.values())))
        return QwenPlan(len(blocks), needs, full)

    def check(self, method: VisionMethod) -> None:
        """Raise UnsupportedModelError for what a method reads, and is not here."""
        depth = len(self.vit.blocks)
        needs = method.needs(depth, depth)
        if needs.cls_attention or (method.needs_cls and not method.keeps_all):
            raise method.without_cls()
        if needs.relevance is not None or needs.words:
            raise UnsupportedModelError(
                f"{method.name} reads the prompt, which is not done for Qwen2.5-VL: use one that "
                "does not, as hiprune"
            )
        if needs.keys or needs.queries or needs.padding or needs.mosaics:
            raise UnsupportedModelError(
                f"{method.name} reads more of a vision tower than Qwen2.5-VL's shows of its "
                "merged tokens: use hiprune or hivtp, which read the attention that patches receive"
            )

    def _nearest(self, layer: int) -> int:
        """The nearest layer with full attention, numbered from 1."""
        full = [index + 1 for index in self.vit.config.fullatt_block_indexes]
        if not full:
            raise UnsupportedModelError(
                "fullatt_block_indexes=[]: every layer of this tower attends by windows, whose "
                "scores cannot be compared across an image"
            )
        return min(full, key=lambda each: (abs(each - layer), -each))

    def see(self, pixels: Tensor, grids: Tensor) -> tuple[list[Tensor], list[VisionContext]]:
        """Tokens of each image, (N, D), as stock sends them, and what the method reads of it.

        Parameters
        ----------
        pixels : Tensor
            (patches, C), as the processor gives them
        grids : Tensor
            (images, 3), the 1 x rows x columns patches of each
        """
        plan, kind = self.plan(), type(self.inner)
        with recording(sorted(set(plan.full.values())), self.vit.config.num_heads) as scores:
            features = kind.get_image_features(self.inner, pixels, grids)
        tokens = list(getattr(features, "pooler_output", features))
        side = self.vit.config.spatial_merge_size
        shapes = [(int(rows) // side, int(columns) // side) for _, rows, columns in grids]
        counts = [rows * columns for rows, columns in shapes]
        merged = {
            layer: score.view(-1, side**2).mean(1).split(counts) for layer, score in scores.items()
        }
        contexts = []
        for image, (grid, states) in enumerate(zip(shapes, tokens, strict=True)):
            raster = self.window_order(grid).argsort()
            received = {
                asked: merged[layer][image][raster.to(states.device)][None]
                for asked, layer in plan.full.items()
            }
            seen = states.detach()[None]
            contexts.append(
                VisionContext(
                    grid=grid,
                    received_attention=received,
                    depth=plan.depth,
                    feature_layer=plan.depth,
                    features=seen if plan.needs.features else None,
                    projected=seen if plan.needs.projected else None,
                    tiles=(1,),
                )
            )
        return tokens, contexts

    def window_order(self, grid: Grid) -> Tensor:
        """(N,) int64, the tokens of an image in the order in which the tower runs them."""
        config = self.vit.config
        side = config.window_size // config.spatial_merge_size // config.patch_size
        rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])
        window = rows // side * -(-grid[1] // side) + columns // side
        return window.flatten().argsort(stable=True)

    def release(self) -> None:
        """Take the hooks off."""
        self._hooks.remove()
