"""A vision transformer with a method: runs to the layer that goes on, scores, selects."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_hvp.encoder.capture import AttentionScores, QKHooks, recording
from llava_hvp.encoder.partitioned import is_partitioned
from llava_hvp.encoder.vit import (
    Geometry,
    hidden_states,
    layers_of,
    project_next,
    read_geometry,
)
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.methods.base import Needs, Selection, VisionMethod, raise_unless_finite
from llava_hvp.pruning.shrunk import select as select_shrunk
from llava_hvp.pruning.stock_weights import StockWeights
from llava_hvp.pruning.switch import Switched
from llava_hvp.pruning.vision_inputs import CapturePlan, HostInputs, context_of

PLANS = 16  # methods whose plans are held; of others they are worked out anew
_CHANGING = threading.Lock()


@dataclass(frozen=True)
class EncodedTiles:
    """Tokens of all tiles, and which of them stay.

    Parameters
    ----------
    features : Tensor
        (T, N, D) of the layer that goes on, on the device, in the images' dtype; what a method
        merged stands where the patches' own stood
    selection : Selection
        on the CPU, but for the weights of its mix
    extra : Tensor | None
        (T, D), of each tile the token that stands at no patch; None where there is none
    reused : bool
        whether they were made for an earlier call
    mosaics : tuple[Selection | None, ...]
        of each image whose mosaic the host shrinks, the choice among its tokens, (1, tokens) on the
        CPU; empty where it shrinks none
    """

    features: Tensor
    selection: Selection
    extra: Tensor | None = None
    reused: bool = False
    mosaics: tuple[Selection | None, ...] = ()


class PrunedEncoder(Switched):
    """What a host's vision tower becomes: it encodes tiles and says which patches stay.

    A mixin for a host's own tower, which has `vit`, `device`, `dtype` and the number of the layer
    that goes on, as an index into the hidden states.
    """

    _plans: tuple[CapturePlan, ...] = ()  # the newest last
    _hooks: QKHooks | None = None  # for all of them
    _stock_weights: StockWeights | None = None  # of a tower whose dtype was changed

    # Of the host's tower.
    device: torch.device
    dtype: torch.dtype

    @property
    def hidden_state_index(self) -> int:
        """The layer that goes on, as an index into the hidden states (-1 the last)."""
        raise NotImplementedError

    def plan(self) -> CapturePlan:
        """What to read of the loaded encoder by the method in force, hooks in place.

        They are set anew where loading has replaced the modules that they sat on. Those that only
        another method reads stay: another thread may be running it.
        """
        layers, method = layers_of(self.vit), self.prune_method
        plan = self._held_plan(layers, method)
        if plan is not None:
            return plan
        with _CHANGING:
            return self._held_plan(layers, method) or self._make_plan(layers, method)

    def _held_plan(self, layers: Sequence[Any], method: VisionMethod) -> CapturePlan | None:
        plan = next((plan for plan in reversed(self._plans) if plan.method == method), None)
        if plan is None or self._hooks is None or not self._hooks.on(layers):
            return None
        feature_layer = plan.geometry.normalised(self.hidden_state_index)
        return plan if plan.feature_layer == feature_layer else None

    def _make_plan(self, layers: Sequence[Any], method: VisionMethod) -> CapturePlan:
        geometry = read_geometry(self.vit)
        self.check_tower(self.prune_switch.now)
        feature_layer = geometry.normalised(self.hidden_state_index)
        needs = method.needs(geometry.depth, feature_layer)
        if self._hooks is not None and not self._hooks.on(layers):
            self._hooks.remove()
            self._hooks, self._plans = None, ()
        if self._hooks is None:
            self._hooks = QKHooks(layers, needs)
        else:
            self._hooks.cover(layers, needs)
        plan = CapturePlan(method, geometry, feature_layer, needs)
        others = [each for each in self._plans if each.method != method]
        self._plans = (*others, plan)[-PLANS:]
        return plan

    def check(self, method: VisionMethod) -> None:
        """Raise a LlavaHvpError unless a method can run on this loaded encoder."""
        check_method(method, read_geometry(self.vit), self.hidden_state_index)

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Run in this dtype from now on; the weights as they were wait on the CPU."""
        with _CHANGING:
            if self.dtype == dtype or self._stock_weights is not None:
                return
            parameters = dict(self.vit.named_parameters())
            foreign = [
                name
                for name, weight in parameters.items()
                if not weight.is_floating_point() or weight.is_meta or is_partitioned(weight)
            ]
            if foreign:
                raise UnsupportedModelError(
                    f"tower_dtype='model' on a vision tower that is quantised, offloaded or "
                    f"partitioned ({foreign[0]}): leave it out"
                )
            self._stock_weights = StockWeights(self.vit)
            self.vit.to(dtype)

    def release(self) -> None:
        """Take the hooks off and give the weights back in their own dtype."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._stock_weights is not None:
            self._stock_weights.put_back(self.vit)
        for name in ("prune_switch", "_plans", "_hooks", "_stock_weights"):
            self.__dict__.pop(name, None)

    @property
    def fuses_attention(self) -> bool:
        """Whether layers whose attention is eager get torch's fused one."""
        return self.prune_runtime.tower_attention == "sdpa" and not self.prune_method.keeps_all

    def run_to_layer(
        self, images: Tensor, needs: Needs | None = None
    ) -> tuple[Tensor, AttentionScores]:
        """(T, 1 + N, D) output of the layer that goes on, and the scores that the method reads.

        Parameters
        ----------
        needs : Needs | None
            what to record in place of that
        """
        plan = self.plan()
        if needs is None:
            needs = plan.needs
        elif self._hooks is not None:
            self._hooks.cover(layers_of(self.vit), needs)
        geometry = plan.geometry
        with recording(needs, geometry.heads, geometry.patches) as scores:
            hidden = hidden_states(self.vit, images, plan.feature_layer, fused=self.fuses_attention)
            project_next(self.vit, hidden, plan.feature_layer, needs)
        return hidden, scores

    @property
    def is_trained(self) -> bool:
        """Whether features are to carry gradients; LLaVA's own tower runs without them."""
        return False

    def encode(
        self, images: Tensor, tiles: tuple[int, ...], inputs: HostInputs | None = None
    ) -> EncodedTiles:
        """Encode tiles and select on each.

        Parameters
        ----------
        images : Tensor
            (T, 3, H, W)
        tiles : tuple[int, ...]
            tiles of each image, T in all
        inputs : HostInputs | None
            what the method reads besides; without any, every tile stands alone

        Raises
        ------
        ScoreError
            scores, or merged features, that are not finite
        TextEncoderError
            the method reads the prompt, and none came
        """
        plan, method = self.plan(), self.prune_method
        if self.prune_runtime.tower_dtype == "model" and not method.keeps_all:
            self.take_dtype(images.dtype)
        inputs = inputs or HostInputs(mosaics=(None,) * len(tiles))
        with torch.set_grad_enabled(self.is_trained):
            hidden, scores = self.run_to_layer(images.to(device=self.device, dtype=self.dtype))
            features = hidden[:, hidden.shape[1] - plan.geometry.patches :].to(images.dtype)
            with torch.no_grad():  # what is chosen has no gradient
                context = context_of(plan, features.detach(), scores, tiles, inputs)
                mosaics: tuple[Selection | None, ...] = ()
                if inputs.shrunk:
                    selection, mosaics = select_shrunk(method, context, inputs.shrunk)
                else:
                    selection = method.select_unchecked(context)
            (names, finite), extra = context.finite(), None
            if selection.mix is not None:
                features, extra = selection.mix.apply(hidden)
                features = features.to(images.dtype)
                extra = None if extra is None else extra.to(images.dtype)
                merged = [tokens for tokens in (features, extra) if tokens is not None]
                whole = torch.stack([tokens.isfinite().all() for tokens in merged]).all()
                names, finite = [*names, "merged features"], torch.cat((finite, whole[None]))
        looked = finite[:0]  # at all scores, by the other transfer
        chosen = tuple(each and on_cpu(each, [], looked) for each in mosaics)
        return EncodedTiles(features, on_cpu(selection, names, finite), extra, mosaics=chosen)


def check_method(method: VisionMethod, geometry: Geometry, hidden_state_index: int) -> None:
    """Raise a LlavaHvpError unless a method can run on an encoder of this geometry."""
    needs = method.needs(geometry.depth, geometry.normalised(hidden_state_index))
    asks_cls = needs.cls_attention or (method.needs_cls and not method.keeps_all)
    if asks_cls and not geometry.has_cls:
        raise method.without_cls()
    method.check(geometry.grid)


def on_cpu(selection: Selection, names: list[str], finite: Tensor) -> Selection:
    """Bring masks, the order of a mix and the look at the scores over, in one transfer.

    Weights of a mix stay where they are.
    """
    masks = torch.stack([selection.keep, *selection.roles.values()])
    mix, device = selection.mix, masks.device
    rank = None if mix is None else mix.rank
    order = masks.new_empty(0, dtype=torch.int32) if rank is None else rank.int()
    parts = masks.flatten(), finite.to(device), order.flatten()
    packed = torch.cat([part.view(torch.uint8) for part in parts]).cpu()
    flags, scores, ranked = packed.split([part.nbytes for part in parts])
    raise_unless_finite(names, scores.bool().tolist())
    keep, *roles = flags.view(torch.bool).view(masks.shape)
    if mix is not None and rank is not None:
        # Copied, as the numbers may begin at any byte.
        mix = replace(mix, rank=ranked.clone().view(torch.int32).view(rank.shape).long())
    return Selection(keep, dict(zip(selection.roles, roles, strict=True)), mix)
