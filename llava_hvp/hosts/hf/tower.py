"""The vision tower of a transformers LLaVA, read from beside: the module itself stays stock's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_hvp.encoder.vit import Geometry, read_geometry
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.pruning.encoding import PrunedEncoder, check_method
from llava_hvp.pruning.switch import Switch
from llava_hvp.runtime import PruningConfig


class PrunedVisionTower(PrunedEncoder):
    """What runs the vision tower of one model instead of its own `get_image_features`.

    Parameters
    ----------
    inner : Any
        a LlavaModel, LlavaNextModel or LlavaOnevisionModel, whose `vision_tower` is a
        CLIPVisionModel or SiglipVisionModel
    pruning : PruningConfig
        the method, and how to run it
    """

    def __init__(self, inner: Any, pruning: PruningConfig) -> None:
        self.inner = inner
        self.prune_switch = Switch(pruning)
        geometry = read_geometry(self.vit)
        check_features(inner.config, geometry)
        check_method(pruning.method, geometry, self.hidden_state_index)
        try:
            self.plan()
        except BaseException:
            self.release()
            raise

    @property
    def vit(self) -> nn.Module:
        """The vision transformer, as it is now."""
        model: nn.Module = self.inner.vision_tower
        return model

    @property
    def hidden_state_index(self) -> int:
        """The layer that goes on, the config's `vision_feature_layer`."""
        return int(self.inner.config.vision_feature_layer)

    @property
    def is_trained(self) -> bool:
        """Whether gradients are wanted: unlike LLaVA's own, stock runs this tower with them."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.vit.parameters())

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the tower runs; the first of several devices."""
        for module in self.vit.modules():
            # Weights that accelerate offloads lie elsewhere, or on meta, until their turn.
            place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if place is not None:
                return torch.device(place)
        return next(self.vit.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the tower's weights that are not quantised."""
        return next(p.dtype for p in self.vit.parameters() if p.is_floating_point())


def check_features(config: Any, geometry: Geometry) -> None:
    """Raise UnsupportedModelError unless one layer's patches, without CLS, are what goes on."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer={layer!r}: pruning reads the one layer whose patches go on"
        )
    if geometry.has_cls and strategy != "default":
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r}: pruning supports 'default', which all "
            "released LLaVA-1.5 and LLaVA-NeXT checkpoints have; 'full' sends CLS as well"
        )
    if not geometry.has_cls and strategy != "full":
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r} on a vision tower without CLS drops the "
            "first patch: pruning supports 'full' there, which LLaVA-OneVision has"
        )
