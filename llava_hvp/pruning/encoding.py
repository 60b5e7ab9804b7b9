"""A vision transformer with a method: runs to the layer that goes on, scores, selects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.encoder.capture import AttentionScores, QKHooks, recording
from llava_hvp.encoder.vit import Geometry, hidden_states, layers_of, read_geometry
from llava_hvp.errors import TextEncoderError, UnsupportedModelError
from llava_hvp.methods.base import (
    Needs,
    Selection,
    VisionContext,
    VisionMethod,
    raise_unless_finite,
)
from llava_hvp.runtime import Runtime

Relevance = Callable[[Tensor], Tensor]  # features (T, N, D) -> relevance (T, N)
_CHANGING = threading.Lock()


@dataclass(frozen=True)
class EncodedTiles:
    """Features of all tiles, and which patches of them stay.

    features : (T, N, D) of the layer that goes on, on the device, in the images' dtype
    selection : on the CPU
    reused : whether they were made for an earlier call
    """

    features: Tensor
    selection: Selection
    reused: bool = False


@dataclass(frozen=True)
class CapturePlan:
    """What a method reads of a loaded encoder, worked out once, with the hooks in place.

    feature_layer : the layer whose output goes on, numbered from 1
    """

    geometry: Geometry
    feature_layer: int
    needs: Needs
    hooks: QKHooks


class StockWeights:
    """A vision transformer's weights in the dtype that they were loaded in, on the CPU.

    While they wait, `state_dict` gives them, so that `save_pretrained` writes what it would of a
    stock tower. A weight that was changed meanwhile counts as it is, in its old dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: p.data.to("cpu") for name, p in model.named_parameters()}
        self._hook = model._register_state_dict_hook(self._into)

    def put_back(self, model: nn.Module) -> None:
        """Give the model its weights back as they were."""
        self._hook.remove()
        for name, parameter in model.named_parameters():
            parameter.data = self._stock(name, parameter.data).to(parameter.device)

    def _stock(self, name: str, now: Tensor) -> Tensor:
        weight = self._weights[name]
        unchanged = torch.equal(weight.to(now.dtype), now.cpu())
        return weight if unchanged else now.to(weight.dtype)

    def _into(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self._weights:
            now = state.get(prefix + name)
            # A Parameter is asked for by keep_vars, as the one in use.
            if now is not None and not isinstance(now, nn.Parameter):
                state[prefix + name] = self._stock(name, now)


class PrunedEncoder:
    """What a host's vision tower becomes: it encodes tiles and says which patches stay.

    A mixin for a host's own tower, which has `vit`, `device`, `dtype` and the number of the layer
    that goes on, as an index into the hidden states.
    """

    prune_method: VisionMethod
    prune_runtime: Runtime
    _plan: CapturePlan | None = None
    _stock_weights: StockWeights | None = None  # of a tower whose dtype was changed

    # Of the host's tower.
    device: torch.device
    dtype: torch.dtype

    @property
    def vit(self) -> nn.Module:
        """The vision transformer, as it is now: loading may replace it."""
        raise NotImplementedError

    @property
    def hidden_state_index(self) -> int:
        """The layer that goes on, as an index into the hidden states (-1 the last)."""
        raise NotImplementedError

    def plan(self) -> CapturePlan:
        """What to read of the loaded encoder, hooks in place.

        They are set anew where loading has replaced the modules that they sat on, and where another
        layer goes on now.
        """
        layers = layers_of(self.vit)
        plan = self._plan
        if plan is not None and self._holds(plan, layers):
            return plan
        with _CHANGING:
            plan = self._plan
            if plan is None or not self._holds(plan, layers):
                if plan is not None:
                    plan.hooks.remove()
                plan = self._plan = self._make_plan(layers)
            return plan

    def _holds(self, plan: CapturePlan, layers: Sequence[Any]) -> bool:
        feature_layer = plan.geometry.normalised(self.hidden_state_index)
        return plan.feature_layer == feature_layer and plan.hooks.on(layers)

    def _make_plan(self, layers: Sequence[Any]) -> CapturePlan:
        geometry = read_geometry(self.vit)
        feature_layer = geometry.normalised(self.hidden_state_index)
        needs = self.prune_method.needs(geometry.depth, feature_layer)
        return CapturePlan(geometry, feature_layer, needs, QKHooks(layers, needs))

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Run in this dtype from now on; the weights as they were wait on the CPU."""
        with _CHANGING:
            if self.dtype == dtype or self._stock_weights is not None:
                return
            parameters = dict(self.vit.named_parameters())
            foreign = [n for n, p in parameters.items() if not p.is_floating_point() or p.is_meta]
            if foreign:
                raise UnsupportedModelError(
                    f"tower_dtype='model' on a vision tower that is quantised or offloaded "
                    f"({foreign[0]}): leave it out"
                )
            self._stock_weights = StockWeights(self.vit)
            self.vit.to(dtype)

    def release(self) -> None:
        """Take the hooks off and give the weights back in their own dtype."""
        if self._plan is not None:
            self._plan.hooks.remove()
        if self._stock_weights is not None:
            self._stock_weights.put_back(self.vit)
        for name in ("prune_method", "prune_runtime", "_plan", "_stock_weights"):
            self.__dict__.pop(name, None)

    @property
    def fuses_attention(self) -> bool:
        """Whether layers whose attention is eager get torch's fused one."""
        return self.prune_runtime.tower_attention == "sdpa" and not self.prune_method.keeps_all

    def run_to_layer(self, images: Tensor) -> tuple[Tensor, AttentionScores]:
        """(T, 1 + N, D) output of the layer that goes on, and the scores that the method reads."""
        plan = self.plan()
        geometry = plan.geometry
        with recording(plan.needs, geometry.heads, geometry.patches) as scores:
            hidden = hidden_states(self.vit, images, plan.feature_layer, fused=self.fuses_attention)
        return hidden, scores

    @torch.no_grad()
    def encode(
        self, images: Tensor, tiles: tuple[int, ...], relevance: Relevance | None = None
    ) -> EncodedTiles:
        """Encode tiles and select on each.

        Parameters
        ----------
        images : (T, 3, H, W)
        tiles : tiles of each image, T in all
        relevance : of the features to the prompt, for a method that needs it

        Raises
        ------
        ScoreError : scores that are not finite
        """
        plan, method = self.plan(), self.prune_method
        geometry, needs = plan.geometry, plan.needs
        if self.prune_runtime.tower_dtype == "model" and not method.keeps_all:
            self.take_dtype(images.dtype)
        hidden, scores = self.run_to_layer(images.to(device=self.device, dtype=self.dtype))
        features = hidden[:, hidden.shape[1] - geometry.patches :].to(images.dtype)
        if needs.relevance is not None and relevance is None:
            raise TextEncoderError(
                f"{method.name} reads the prompt, and none came with the images: call the model "
                "with input_ids, or use a method that does not read it"
            )
        context = VisionContext(
            grid=geometry.grid,
            # A tower spread over several devices leaves its scores on each.
            received_attention={
                layer: s.to(features.device) for layer, s in scores.received_attention.items()
            },
            depth=geometry.depth,
            feature_layer=plan.feature_layer,
            cls_attention={
                layer: s.to(features.device) for layer, s in scores.cls_attention.items()
            },
            features=features if needs.features else None,
            relevance=relevance(features) if needs.relevance and relevance else None,
            tiles=tiles,
        )
        return EncodedTiles(features, _selection_on_cpu(method, context))


def _selection_on_cpu(method: VisionMethod, context: VisionContext) -> Selection:
    """Select, and bring masks and the look at the scores over in the one transfer there is."""
    selection = method.select_unchecked(context)
    names, finite = context.finite()
    masks = torch.stack([selection.keep, *selection.roles.values()])
    packed = torch.cat([masks.flatten(), finite.to(masks.device)]).cpu()
    raise_unless_finite(names, packed[masks.numel() :].tolist())
    keep, *roles = packed[: masks.numel()].view(masks.shape)
    return Selection(keep, dict(zip(selection.roles, roles, strict=True)))
