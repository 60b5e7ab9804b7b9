"""What a method at the vision tower is given to read, of the encoder and of what a host knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llava_hvp.encoder.capture import AttentionScores
from llava_hvp.encoder.vit import Geometry
from llava_hvp.errors import TextEncoderError
from llava_hvp.methods.base import Needs, VisionContext, VisionMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.shrunk import Shrunk

OfFeatures = Callable[[Tensor], Tensor]  # of features (T, N, D)


@dataclass(frozen=True)
class HostInputs:
    """What a method may read that a vision tower does not know; a host gives what is needed.

    Parameters
    ----------
    relevance : OfFeatures | None
        of features to the prompt of their image, (T, N)
    projected : OfFeatures | None
        features as the language model takes them, (T, N, P)
    words, mosaics : tuple[Tensor, ...] | None | tuple[Grid | None, ...] | None
        as in VisionContext
    padding : Tensor | None
        as in VisionContext, on the CPU
    shrunk : tuple[Shrunk | None, ...]
        of each image whose mosaic the host shrinks, how; empty where it shrinks none
    """

    relevance: OfFeatures | None = None
    projected: OfFeatures | None = None
    words: tuple[Tensor, ...] | None = None
    mosaics: tuple[Grid | None, ...] | None = None
    padding: Tensor | None = None
    shrunk: tuple[Shrunk | None, ...] = ()


@dataclass(frozen=True)
class CapturePlan:
    """What a method reads of a loaded encoder, worked out once for each.

    Parameters
    ----------
    feature_layer : int
        the layer whose output goes on, numbered from 1
    """

    method: VisionMethod
    geometry: Geometry
    feature_layer: int
    needs: Needs


def context_of(
    plan: CapturePlan,
    features: Tensor,
    scores: AttentionScores,
    tiles: tuple[int, ...],
    inputs: HostInputs,
) -> VisionContext:
    """What the method of a plan reads, and no more.

    Raises TextEncoderError where it reads the prompt, and none came.
    """
    needs, device = plan.needs, features.device
    if (needs.relevance and inputs.relevance is None) or (needs.words and inputs.words is None):
        raise TextEncoderError(
            f"{plan.method.name} reads the prompt, and none came with the images: call the model "
            "with input_ids, or use a method that does not read it"
        )

    def moved(by_layer: dict[int, Tensor]) -> dict[int, Tensor]:
        # A tower spread over several devices leaves its scores on each.
        return {layer: tensor.to(device) for layer, tensor in by_layer.items()}

    return VisionContext(
        grid=plan.geometry.grid,
        received_attention=moved(scores.received_attention),
        depth=plan.geometry.depth,
        feature_layer=plan.feature_layer,
        cls_attention=moved(scores.cls_attention),
        features=features if needs.features else None,
        relevance=inputs.relevance(features) if needs.relevance and inputs.relevance else None,
        tiles=tiles,
        keys=moved(scores.keys),
        queries=moved(scores.queries),
        heads=plan.geometry.heads,
        projected=inputs.projected(features) if needs.projected and inputs.projected else None,
        words=tuple(w.to(device) for w in inputs.words or ()) if needs.words else None,
        padding=inputs.padding.to(device) if inputs.padding is not None else None,
        mosaics=inputs.mosaics,
    )
