"""LLaVA's CLIP vision tower with a method on it."""

from __future__ import annotations

from typing import Any

import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import Tensor, nn

from llava_hvp.encoder.vit import attention_of, geometry_of, read_geometry
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import VisionMethod
from llava_hvp.pruning.encoding import PrunedEncoder, check_method
from llava_hvp.pruning.packing import features_by_tile
from llava_hvp.pruning.switch import Switch
from llava_hvp.runtime import PruningConfig


class PrunedCLIPVisionTower(PrunedEncoder, CLIPVisionTower):
    """LLaVA's `CLIPVisionTower`, handing on only the patches that a method keeps.

    `build_vision_tower` makes one while `builder.install(method)` holds; `adopt` turns a loaded
    stock tower into one, in place, and `release` turns it back.
    """

    def __init__(
        self, vision_tower: str, args: Any, delay_load: bool = False, *, pruning: PruningConfig
    ):
        self.prune_switch = Switch(pruning)
        super().__init__(vision_tower, args, delay_load)
        if not self.is_loaded:  # now, and not when the language model is there
            check_method(pruning.method, geometry_of(self.cfg_only), self.select_layer)

    @classmethod
    def adopt(cls, tower: CLIPVisionTower, pruning: PruningConfig) -> None:
        """Make a loaded stock tower a pruned one; on an error it stays as it was."""
        check_tower(tower, pruning.method)
        tower.__class__ = cls
        tower.prune_switch = Switch(pruning)
        try:
            tower.plan()
        except BaseException:
            tower.release()
            raise

    def release(self) -> None:
        """Back to the stock tower, hooks and attributes gone."""
        super().release()
        self.__class__ = CLIPVisionTower

    @property
    def vit(self) -> nn.Module:
        """The vision transformer, as it is now: loading may replace it."""
        model: nn.Module = self.vision_tower
        return model

    @property
    def hidden_state_index(self) -> int:
        """The layer that goes on, LLaVA's `mm_vision_select_layer`."""
        return int(self.select_layer)

    def load_model(self, device_map: Any = None) -> None:
        super().load_model(device_map=device_map)
        check_tower(self, self.prune_method)

    def forward(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Tokens sent, a (kept, D) tensor for each tile; each tile counts as an image.

        A list and not a tensor: a model without our `encode_images` fails on it rather than
        running unpruned.
        """
        if isinstance(images, list):
            images = torch.stack(images)
        encoded = self.encode(images, (1,) * len(images))
        return features_by_tile(encoded, self.prune_method, self.plan().geometry.grid)


def tower_facts(tower: Any) -> dict[str, str]:
    """In which dtype and by which attention a tower encodes, pruned or not, for results."""
    fused = isinstance(tower, PrunedCLIPVisionTower) and tower.fuses_attention
    try:
        attention = attention_of(tower.vision_tower, fused=fused)
    except AttributeError:  # unpruned, no CLIP
        attention = "unknown"
    return {
        "vision_tower_dtype": str(tower.dtype).removeprefix("torch."),
        "vision_tower_attention": attention,
    }


def check_tower(tower: Any, method: VisionMethod) -> None:
    """Raise a LlavaHvpError unless `method` can run on this loaded tower."""
    if not isinstance(tower, CLIPVisionTower) or type(tower) not in (
        CLIPVisionTower,
        PrunedCLIPVisionTower,
    ):
        raise UnsupportedModelError(
            f"the vision tower is a {type(tower).__name__}: pruning reads the attention of LLaVA's "
            "CLIPVisionTower (S2, convolutional and other towers have no one grid of patches)"
        )
    if not tower.is_loaded:
        raise UnsupportedModelError(
            f"the vision tower {tower.vision_tower_name!r} is not loaded: call its load_model()"
        )
    if tower.select_feature != "patch":
        raise UnsupportedModelError(
            f"mm_vision_select_feature={tower.select_feature!r}: pruning supports 'patch', which "
            "all released LLaVA-1.5 and LLaVA-NeXT checkpoints have"
        )
    check_method(method, read_geometry(tower.vision_tower), tower.select_layer)
