"""transformers' own LLaVA classes: putting a method on a model of theirs, and taking it off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp import hosts
from llava_hvp.decoder.hooks import DecoderHooks
from llava_hvp.encoder.text import ClipText, load_tokenizer
from llava_hvp.encoder.vit import attention_of, read_geometry
from llava_hvp.errors import (
    OptionError,
    TextEncoderError,
    UnsupportedModelError,
)
from llava_hvp.hosts.hf.cache import new_cache
from llava_hvp.hosts.hf.families import family_of
from llava_hvp.hosts.hf.features import GetImageFeatures
from llava_hvp.hosts.hf.forward import ForwardHook
from llava_hvp.hosts.hf.generate import ShortGenerate
from llava_hvp.hosts.hf.prompt import KNOWN, Marks, marks_of, read_prompt
from llava_hvp.hosts.hf.qwen.positions import RopeIndex
from llava_hvp.hosts.hf.versions import check_release
from llava_hvp.hosts.hf.view import HFView
from llava_hvp.methods.base import Method
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.methods.masks import Grid
from llava_hvp.pruning.layout import Layout, Size
from llava_hvp.pruning.pruning import CHANGING, Pruning
from llava_hvp.runtime import PruningConfig, Runtime

CLIP = "clip_checkpoint"  # in the config of a checkpoint that we converted
# Hugging Face checkpoints do not name the CLIP that their tower came from, which holds the text
# encoder. (layers, hidden size, grid) -> the one that LLaVA was trained with.
CLIPS = {(24, 1024, (24, 24)): "openai/clip-vit-large-patch14-336"}


class HFModel:
    """A transformers LLaVA as the core sees it: `llava_hvp.pruning.host.HostModel`."""

    def __init__(self, model: Any, pruning: PruningConfig, processor: Any = None) -> None:
        self.model = model
        self.family = family_of(model)
        self.encoder: Any = self.family.tower(model.model, pruning)
        self.processor = processor
        self.handles: list[Any] = []
        self._marks: tuple[Marks, ...] | None = None

    def decoder_hooks(self) -> DecoderHooks:
        """Hooks on the language model, for methods inside it."""
        if not self.family.prunes_inside:
            raise UnsupportedModelError(
                "a method inside the language model, which of transformers' own classes is done "
                f"for LLaVA-1.5 and LLaVA-NeXT: give this {type(self.model).__name__} a method at "
                "the vision tower, as HiPrune(r_max=0.5)"
            )
        return DecoderHooks(self.model.model.language_model, new_cache)

    @property
    def grid(self) -> Grid:
        """(rows, columns) of patches of a tile, while pruned and after."""
        return read_geometry(self.encoder.vit).grid

    def layout(self, tiles: int, size: Size | None, merge: str) -> Layout:
        """The tokens that stock sends of an image of `tiles` tiles."""
        placed: Layout = self.family.layout(self.model.model, self.grid, tiles, size, merge)
        return placed

    def mosaic(self, tiles: int, size: Size | None) -> Grid | None:
        """(down, across) of the tiles behind an image's first; None where tiles stand alone."""
        grid: Grid | None = self.family.mosaic(self.model.model, tiles, size)
        return grid

    def padding(self, size: Size | None) -> Tensor:
        """(N,) bool, no patch: processors of these checkpoints crop or squeeze a picture."""
        return torch.zeros(self.encoder.plan().geometry.patches, dtype=torch.bool)

    @property
    def projector(self) -> nn.Module:
        """What `project` runs."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    def project(self, features: Tensor) -> Tensor:
        """(…, D) features of patches as the language model takes them."""
        projected: Tensor = self.projector(features)
        return projected

    def newline(self) -> Tensor:
        """(D,) the embedding that ends a row of the mosaic."""
        inner = self.model.model
        newline: Tensor = inner.image_newline
        if not newline.is_meta:
            return newline
        # accelerate has it elsewhere while the model inside does not run.
        hook = inner._hf_hook
        waiting: Tensor = hook.weights_map["image_newline"].to(hook.execution_device)
        return waiting

    def view(self) -> HFView:
        """How the model sees pictures, to draw on one."""
        return HFView(self)

    def prompts(self, rows: Sequence[Tensor], images: int, tokenizer: Any) -> list[str]:
        """What each image is asked: the last user turn of the row that it stands in.

        Parameters
        ----------
        rows : Sequence[Tensor]
            the row of each image
        """
        if self._marks is None:
            template = getattr(self.processor, "chat_template", None)
            self._marks = (*KNOWN, *marks_of(tokenizer, template))
        token = self.model.config.image_token_id
        return [read_prompt(row, tokenizer, token, self._marks) for row in rows]

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens, D) input embeddings of the language model."""
        embed = self.model.get_input_embeddings()
        place = embed.weight.device
        # Of an offloaded layer accelerate's own hooks move what comes in.
        embedded: Tensor = embed(ids if place.type == "meta" else ids.to(place))
        return embedded

    @property
    def clip_checkpoint(self) -> str:
        """The CLIP that the tower came from, by the config or its shape.

        Raises TextEncoderError if unknown.
        """
        named = getattr(self.model.config, CLIP, None)
        if named is not None:
            return str(named)
        config: Any = self.encoder.vit.config
        grid = self.encoder.plan().geometry.grid
        shape = config.num_hidden_layers, config.hidden_size, grid
        if shape not in CLIPS:
            raise TextEncoderError(
                f"no CLIP is known whose vision tower has {shape[0]} layers of {shape[1]} and a "
                f"grid of {grid[0]} x {grid[1]} patches: name the one that this checkpoint's came "
                "from, as prune(model, method, clip_text='name or folder') or "
                "--prune-opt clip_text=…"
            )
        return CLIPS[shape]

    def load_tokenizer(self) -> Any:
        """The model's own tokenizer; raises TextEncoderError where there is none."""
        remedy = "pass it or the processor, as prune(model, method, tokenizer=processor)"
        return load_tokenizer(self.model.config._name_or_path, remedy)

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
    """Prune a transformers LLaVA; see `llava_hvp.prune`."""
    check_release()
    chosen = PruningConfig.checked(method, runtime, inside)
    check_tiling(chosen.runtime.tiling)
    model = find(model)
    with CHANGING:
        hosts.check_unpruned("llava_hvp" in vars(model), model.model, ["get_image_features"])
        processor = tokenizer if hasattr(tokenizer, "tokenizer") else None
        host = HFModel(model, chosen, processor)
        if host.family.keeps_positions and chosen.runtime != Runtime():
            raise OptionError(
                f"{type(model).__name__} takes no Runtime: its images are one grid each, and its "
                "tower runs as it was loaded: leave runtime out"
            )
        pruning = Pruning(host, getattr(tokenizer, "tokenizer", tokenizer), clip_text)
        if chosen.inside is not None:
            try:
                pruning.plan_of(chosen.inside)
            except BaseException:
                host.encoder.release()
                raise
        hook = ForwardHook(pruning)
        host.handles += [
            part.register_forward_pre_hook(hook, with_kwargs=True) for part in (model, model.model)
        ]
        model.llava_hvp = pruning
        model.model.get_image_features = GetImageFeatures(pruning)
        if host.family.keeps_positions:
            model.model.get_rope_index = RopeIndex(pruning)
        model.generate = ShortGenerate(pruning, model.__dict__.get("generate"))
    return pruning.with_text()


def check_tiling(tiling: str) -> None:
    """Raise OptionError unless pictures are cut as the processor has it, which cuts them."""
    if tiling != "stock":
        raise OptionError(
            f"tiling={tiling!r} on transformers' own classes, whose processor cuts "
            "the tiles: set image_grid_pinpoints of processor.image_processor and of model.config, "
            "as [[672, 672]]"
        )


def detach(model: Any) -> None:
    """Give a transformers LLaVA back as it was; see `llava_hvp.unprune`."""
    model = find(model)
    with CHANGING:
        pruning = hosts.pruning_of(model)
        del model.__dict__["llava_hvp"]
        host = pruning.host_model
        for handle in host.handles:
            handle.remove()
        if pruning.hooks is not None:
            pruning.hooks.remove()
        host.encoder.release()
        for name in ("get_image_features", "get_rope_index"):
            model.model.__dict__.pop(name, None)
        ours = model.__dict__.pop("generate", None)
        earlier = getattr(ours, "earlier", None)
        if earlier is not None:
            model.generate = earlier


def tiled(model: Any, tiling: str) -> AbstractContextManager[None]:
    """For an unpruned model to cut pictures so; raises OptionError for any but stock."""
    check_tiling(tiling)
    return nullcontext()


def facts_of(model: Any) -> dict[str, str]:
    """In which dtype and by which attention its tower encodes, pruned or not, for results.

    Parameters
    ----------
    model : Any
        one of the pruned classes, or the one inside it
    """
    pruning = vars(model).get("llava_hvp")
    inner = getattr(model, "model", model)
    if hasattr(inner, "visual"):  # Qwen2.5-VL, whose tower runs as it was loaded
        vit, attention = inner.visual, inner.visual.config._attn_implementation
    else:
        vit = inner.vision_tower
        fused = pruning is not None and pruning.host_model.encoder.fuses_attention
        attention = attention_of(vit, fused=fused)
    dtype = next(p.dtype for p in vit.parameters() if p.is_floating_point())
    return {
        "vision_tower_dtype": str(dtype).removeprefix("torch."),
        "vision_tower_attention": attention,
    }


def find(model: Any) -> Any:
    """The model in what the user holds: itself, or inside a wrapper (PEFT, DDP).

    Raises UnsupportedModelError where there is none.
    """
    return hosts.find(model, lambda part: family_of(part) is not None)
