"""LLaVA's own classes: putting a method on a model of theirs, and taking it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.model.llava_arch import LlavaMetaForCausalLM
from torch import Tensor, nn

from llava_hvp import hosts
from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.encoder.partitioned import gathered
from llava_hvp.encoder.text import ClipText, load_tokenizer
from llava_hvp.errors import UnsupportedModelError
from llava_hvp.hosts.llava import compat, grid, overrides, tiling
from llava_hvp.hosts.llava.prompt import read_prompt, rows_of_images
from llava_hvp.hosts.llava.tiling import TilingConfig
from llava_hvp.hosts.llava.tower import PrunedCLIPVisionTower, tower_facts
from llava_hvp.hosts.llava.view import LlavaView
from llava_hvp.methods.base import Method
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.generate import Generate
from llava_hvp.pruning.layout import Layout, Size
from llava_hvp.pruning.pruning import CHANGING, Pruning
from llava_hvp.runtime import PruningConfig, Runtime

OVERRIDES: tuple[Callable[..., Any], ...] = (
    overrides.encode_images,
    overrides.prepare_inputs_labels_for_multimodal,
)


@dataclass(frozen=True)
class LlavaModel:
    """A LLaVA model as the core sees it: `llava_hvp.pruning.host.HostModel`."""

    model: Any

    @property
    def encoder(self) -> PrunedCLIPVisionTower:
        """The vision tower; raises UnsupportedModelError where it is no pruned one any more."""
        tower = self.model.get_vision_tower()
        if not isinstance(tower, PrunedCLIPVisionTower):
            raise UnsupportedModelError(
                "this model was set up for pruning, but its vision tower is a "
                f"{type(tower).__name__} now: load the model again, or unprune(model) first"
            )
        return tower

    def decoder_hooks(self) -> DecoderHooks:
        """Hooks on the language model, for methods inside it."""
        return DecoderHooks(self.model.get_model(), compat.new_cache)

    def tiling(self) -> TilingConfig:
        """What decides on the layout of its images."""
        tower, config = self.encoder, self.model.config
        grid.check_fixed(config, tower.prune_runtime.tiling)
        return TilingConfig.of(config, tower.plan().geometry.grid, tower.config.image_size)

    def layout(self, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens that LLaVA would send of an image of `tiles` tiles."""
        return tiling.layout(self.tiling(), tiles, size, merge)

    def mosaic(self, tiles: int, size: Size | None) -> Grid | None:
        """(down, across) of the tiles behind an image's first; None where tiles stand alone."""
        return tiling.arrangement(self.tiling(), tiles, size)

    def padding(self, size: Size | None) -> Tensor:
        """(N,) bool, the patches of a tile that show nothing but the padding of a squared picture.

        Raises UnsupportedModelError where LLaVA squares pictures and the size is unknown.
        """
        return tiling.padding(self.tiling(), size)

    @property
    def projector(self) -> nn.Module:
        """What `project` runs."""
        projector: nn.Module = self.model.get_model().mm_projector
        return projector

    def project(self, features: Tensor) -> Tensor:
        """(…, D) features of patches as the language model takes them."""
        projected: Tensor = self.projector(features)
        return projected

    def newline(self) -> Tensor:
        """(D,) the embedding that ends a row of the mosaic."""
        newline: Tensor = self.model.get_model().image_newline
        with gathered(newline):
            return newline.clone()

    def view(self) -> LlavaView:
        """How the model sees pictures, to draw on one."""
        return LlavaView.of(self.encoder, self.tiling())

    def prompts(self, rows: Sequence[Tensor], images: int, tokenizer: Any) -> list[str]:
        """What each image is asked: the last user turn of the row that it stands in."""
        return [read_prompt(row, tokenizer) for row in rows_of_images(list(rows), images)]

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens, D) input embeddings of the language model."""
        embed = self.model.get_model().embed_tokens
        embedded: Tensor = embed(ids.to(embed.weight.device))
        return embedded

    @property
    def clip_checkpoint(self) -> str:
        """Name or folder of the tower's own checkpoint."""
        return str(self.encoder.vision_tower_name)

    def load_tokenizer(self) -> Any:
        """The language model's own tokenizer; raises TextEncoderError where there is none."""
        remedy = "pass it, as prune(model, method, tokenizer=tokenizer)"
        return load_tokenizer(self.model.config._name_or_path, remedy, use_fast=False)

    def detach(self) -> None:
        """Give the model back as it was."""
        detach(self.model)


def attach(
    model: Any,
    method: Method | PruningConfig,
    inside: LanguageMethod | None = None,
    *,
    runtime: Runtime | None = None,
    tokenizer: Any = None,
    clip_text: str | Path | ClipText | None = None,
) -> Pruning:
    """Prune a LLaVA model; see `llava_hvp.prune`.

    Parameters
    ----------
    clip_text : str | Path | ClipText | None
        instead of the one in the tower's own checkpoint; its name, its folder, or loaded
    """
    chosen = PruningConfig.checked(method, runtime, inside)
    model = find_llava(model)
    with CHANGING:
        tower = _unpruned_tower(model)
        grid.check_anyres(model.config, chosen.runtime.tiling)
        PrunedCLIPVisionTower.adopt(tower, chosen)
        try:
            pruning = bind(model, chosen, tokenizer, clip_text)
        except BaseException:
            tower.release()
            raise
    return pruning.with_text()


def _unpruned_tower(model: Any) -> Any:
    """The vision tower of a model that nobody prunes; raises a LlavaHvpError where that is not."""
    tower = model.get_vision_tower()
    if tower is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no vision tower: load a LLaVA checkpoint"
        )
    pruned = "llava_hvp" in vars(model) or isinstance(tower, PrunedCLIPVisionTower)
    hosts.check_unpruned(pruned, model, [override.__name__ for override in OVERRIDES])
    return tower


def bind(
    model: Any,
    chosen: PruningConfig,
    tokenizer: Any = None,
    clip_text: str | Path | ClipText | None = None,
) -> Pruning:
    """Give one model the overrides, the config of its tiling and the hooks of a method inside.

    Its tower decides the rest.
    """
    pruning = Pruning(LlavaModel(model), tokenizer, clip_text)
    if chosen.inside is not None:
        pruning.plan_of(chosen.inside)
    if model.get_vision_tower() is not None:  # else LLaVA's training makes one later
        grid.fix(model, chosen.runtime.tiling)
    model.llava_hvp = pruning
    for override in (*OVERRIDES, *compat.instance_bridges()):
        # No MethodType: one of those is pickled by its name, and loaded as the stock method.
        setattr(model, override.__name__, functools.partial(override, model))
    model.generate = Generate(pruning, model.__dict__.get("generate"))
    return pruning


def check_bound(model: Any) -> Pruning:
    """The pruning of a model that was loaded after `builder.install`.

    Raises UnsupportedModelError if it would run unpruned.
    """
    model = find_llava(model)
    tower = model.get_vision_tower()
    if "llava_hvp" not in model.__dict__ or not isinstance(tower, PrunedCLIPVisionTower):
        raise UnsupportedModelError(
            f"this {type(model).__name__} with a {type(tower).__name__} was not built by LLaVA's "
            "own builder, and would not be pruned: call prune(model, method) on it instead"
        )
    if not tower.is_loaded:
        raise UnsupportedModelError(
            "LLaVA's loader left the vision tower unloaded, as it does for names without `llava` "
            "in them: rename the checkpoint's folder, or call the tower's load_model()"
        )
    return model.llava_hvp


def detach(model: Any) -> None:
    """Give a LLaVA model back as it was; see `llava_hvp.unprune`."""
    model = find_llava(model)
    with CHANGING:
        pruning = hosts.pruning_of(model)
        for override in (*OVERRIDES, *compat.instance_bridges()):
            model.__dict__.pop(override.__name__, None)
        if isinstance(model.__dict__.get("generate"), Generate):  # else somebody's who calls it
            earlier = model.__dict__.pop("generate").earlier
            if earlier is not None:
                model.generate = earlier
        if pruning.hooks is not None:
            pruning.hooks.remove()
        del model.__dict__["llava_hvp"]
        grid.release(model)
        tower = model.get_vision_tower()
        if isinstance(tower, PrunedCLIPVisionTower):
            tower.release()


def tiled(model: Any, tiling: str) -> AbstractContextManager[None]:
    """Inside the block an unpruned model cuts pictures so, as `Runtime.tiling` has it."""
    return grid.fixed(model, tiling)


def facts_of(model: Any) -> dict[str, str]:
    """In which dtype and by which attention its tower encodes, pruned or not, for results."""
    return tower_facts(model.get_vision_tower())


def find_llava(model: Any) -> Any:
    """The LLaVA model in what the user holds: itself, or inside a wrapper (PEFT, DDP).

    Raises UnsupportedModelError where there is none.
    """
    return hosts.find(model, lambda part: isinstance(part, LlavaMetaForCausalLM))
