"""LLaVA's CLIP vision tower with a method: runs to the selected layer, scores, selects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import Tensor, nn

from llava_hvp.encoder.capture import AttentionScores, Taps, recording
from llava_hvp.encoder.vit import Geometry, hidden_states, layers_of, read_geometry
from llava_hvp.errors import TextEncoderError, UnsupportedModelError
from llava_hvp.methods.base import Method, Needs, Selection, VisionContext, raise_unless_finite

Relevance = Callable[[Tensor], Tensor]  # features (T, N, D) -> relevance (T, N)
_CHANGING = threading.Lock()


@dataclass(frozen=True)
class Encoded:
    """features : (T, N, D) of the selected layer, on the device, in the images' dtype
    selection : which patches of them stay, on the CPU
    reused : whether they were made for an earlier call
    """

    features: Tensor
    selection: Selection
    reused: bool = False


@dataclass(frozen=True)
class Reading:
    """What a method reads of a loaded tower, worked out once.

    select : the layer whose output goes on, numbered from 1
    """

    geometry: Geometry
    select: int
    needs: Needs
    taps: Taps


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


class PrunedCLIPVisionTower(CLIPVisionTower):
    """LLaVA's `CLIPVisionTower`, handing on only the patches that a method keeps.

    `build_vision_tower` makes one while `builder.install(method)` holds; `adopt` turns a loaded
    stock tower into one, in place, and `release` turns it back.
    """

    prune_method: Method
    _reading: Reading | None = None
    _stock_weights: StockWeights | None = None  # of a tower whose dtype was changed

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False, *, method: Method):
        self.prune_method = method
        super().__init__(vision_tower, args, delay_load)

    @classmethod
    def adopt(cls, tower: CLIPVisionTower, method: Method) -> None:
        """Make a loaded stock tower a pruned one; on an error it stays as it was."""
        check_tower(tower, method)
        tower.__class__ = cls
        tower.prune_method = method
        try:
            tower.reading()
        except BaseException:
            tower.release()
            raise

    def release(self) -> None:
        """Back to the stock tower, hooks and attributes gone."""
        if self._reading is not None:
            self._reading.taps.remove()
        if self._stock_weights is not None:
            self._stock_weights.put_back(self.vision_tower)
        for name in ("prune_method", "_reading", "_stock_weights"):
            self.__dict__.pop(name, None)
        self.__class__ = CLIPVisionTower

    def load_model(self, device_map: Any = None) -> None:
        super().load_model(device_map=device_map)
        check_tower(self, self.prune_method)

    def reading(self) -> Reading:
        """What to read of the loaded tower, hooks in place.

        They are set anew where loading has replaced the modules that they sat on, and where
        `select_layer` is another one now.
        """
        layers = layers_of(self.vision_tower)
        reading = self._reading
        if reading is not None and self._holds(reading, layers):
            return reading
        with _CHANGING:
            reading = self._reading
            if reading is None or not self._holds(reading, layers):
                if reading is not None:
                    reading.taps.remove()
                reading = self._reading = self._read(layers)
            return reading

    def _holds(self, reading: Reading, layers: Sequence[Any]) -> bool:
        select = reading.geometry.normalised(self.select_layer)
        return reading.select == select and reading.taps.on(layers)

    def _read(self, layers: Sequence[Any]) -> Reading:
        geometry = read_geometry(self.vision_tower)
        select = geometry.normalised(self.select_layer)
        needs = self.prune_method.needs(geometry.depth, select)
        return Reading(geometry, select, needs, Taps(layers, needs))

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Run in this dtype from now on; the weights as they were wait on the CPU for `release`."""
        with _CHANGING:
            if self.dtype == dtype or self._stock_weights is not None:
                return
            parameters = dict(self.vision_tower.named_parameters())
            foreign = [n for n, p in parameters.items() if not p.is_floating_point() or p.is_meta]
            if foreign:
                raise UnsupportedModelError(
                    f"tower_dtype='model' on a vision tower that is quantised or offloaded "
                    f"({foreign[0]}): leave it out"
                )
            self._stock_weights = StockWeights(self.vision_tower)
            self.vision_tower.to(dtype)

    def see(self, images: Tensor) -> tuple[Tensor, AttentionScores]:
        """(T, 1 + N, D) output of the selected layer, and the scores that the method reads."""
        reading, method = self.reading(), self.prune_method
        geometry = reading.geometry
        fused = method.tower_attention == "sdpa" and not method.keeps_all
        with recording(reading.needs, geometry.heads, geometry.patches) as scores:
            hidden = hidden_states(self.vision_tower, images, reading.select, fused=fused)
        return hidden, scores

    @torch.no_grad()
    def encode(
        self, images: Tensor, tiles: tuple[int, ...], relevance: Relevance | None = None
    ) -> Encoded:
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
        reading, method = self.reading(), self.prune_method
        geometry, needs = reading.geometry, reading.needs
        if method.tower_dtype == "model" and not method.keeps_all:
            self.take_dtype(images.dtype)
        hidden, scores = self.see(images.to(device=self.device, dtype=self.dtype))
        features = hidden[:, hidden.shape[1] - geometry.patches :].to(images.dtype)
        if needs.relevance is not None and relevance is None:
            raise TextEncoderError(
                f"{method.name} reads the prompt, and none came with the images: call the model "
                "with input_ids, or use a method that does not read it"
            )
        context = VisionContext(
            grid=geometry.grid,
            # A tower spread over several devices leaves its scores on each.
            received={layer: s.to(features.device) for layer, s in scores.received.items()},
            depth=geometry.depth,
            select=reading.select,
            cls={layer: s.to(features.device) for layer, s in scores.cls.items()},
            features=features if needs.features else None,
            relevance=relevance(features) if needs.relevance and relevance else None,
            tiles=tiles,
        )
        return Encoded(features, _selection_on_cpu(method, context))

    def forward(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Kept features, a (kept, D) tensor for each tile; each tile counts as an image.

        A list and not a tensor: a model without our `encode_images` fails on it rather than
        running unpruned.
        """
        if isinstance(images, list):
            images = torch.stack(images)
        encoded = self.encode(images, (1,) * len(images))
        keep = encoded.selection.keep.to(encoded.features.device)
        return [tile[mask] for tile, mask in zip(encoded.features, keep, strict=True)]


def check_tower(tower: Any, method: Method) -> None:
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
    geometry = read_geometry(tower.vision_tower)
    method.needs(geometry.depth, geometry.normalised(tower.select_layer))
    method.check(geometry.grid)


def _selection_on_cpu(method: Method, context: VisionContext) -> Selection:
    """Select, and bring masks and the look at the scores over in the one transfer there is."""
    selection = method.select_unchecked(context)
    names, finite = context.finite()
    masks = torch.stack([selection.keep, *selection.roles.values()])
    packed = torch.cat([masks.flatten(), finite.to(masks.device)]).cpu()
    raise_unless_finite(names, packed[masks.numel() :].tolist())
    keep, *roles = packed[: masks.numel()].view(masks.shape)
    return Selection(keep, dict(zip(selection.roles, roles, strict=True)))
