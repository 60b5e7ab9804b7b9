"""`get_image_features` of one model: what whoever calls it by hand gets is pruned too."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from llava_hvp.hosts.hf.refusals import check_settings
from llava_hvp.hosts.hf.versions import release
from llava_hvp.pruning.pruning import Pruning


class GetImageFeatures:
    """Stands in for the `get_image_features` of the model inside: features that are pruned."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning

    @property
    def __signature__(self) -> inspect.Signature:
        inner = self.pruning.host_model.model.model
        return inspect.signature(type(inner).get_image_features.__get__(inner))

    @torch.compiler.disable
    def __call__(
        self, pixel_values: Tensor, *args: Any, return_dict: bool = True, **beside: Any
    ) -> Any:
        host: Any = self.pruning.host_model
        names = list(self.__signature__.parameters)[1:]
        beside |= dict(zip(names, args, strict=False))
        check_settings(beside, host.model.config)
        images = host.family.images(self.pruning, pixel_values, beside)
        dtype = host.model.get_input_embeddings().weight.dtype
        every = range(len(images.stock))
        packed = images.packed(every, None, dtype) if every else None
        features = [] if packed is None else packed.features
        if packed is not None and self.pruning.inside is None:
            self.pruning.record(packed.reports)  # else no prompt says what becomes of them
        if release() < (5, 0):
            return features
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output = BaseModelOutputWithPooling(pooler_output=features)
        return output if return_dict else output.to_tuple()
