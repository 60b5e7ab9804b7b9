"""A loaded checkpoint and one picture: what each method keeps of it, and what is answered then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_hvp.checkpoints.checkpoint import Checkpoint
from llava_hvp.checkpoints.opening import open_checkpoint
from llava_hvp.checkpoints.variants import PrunedBy, Variant
from llava_hvp.encoder.capture import QKHooks, recording
from llava_hvp.encoder.vit import hidden_states, layers_of, read_geometry
from llava_hvp.errors import LayerError
from llava_hvp.methods.base import Needs, Selection
from llava_hvp.methods.uniform import Uniform
from llava_hvp.pruning.report import ImageReport
from llava_hvp.runtime import PruningConfig
from llava_hvp.show.colours import UNPRUNED
from llava_hvp.show.frame import View


@dataclass
class Viewer:
    """A model on its device, and how it sees pictures."""

    checkpoint: Checkpoint
    view: View

    @classmethod
    def load(
        cls,
        path: str,
        base: str | None,
        device: str,
        *,
        bits: int | None,
        conv_mode: str | None = None,
        tiling: str = "stock",
    ) -> Viewer:
        """By `open_checkpoint`; raises OptionError if it fails.

        Parameters
        ----------
        tiling : str
            as Runtime has it, of everything that is shown
        conv_mode : str | None
            conversation template, by default that of the checkpoint's name
        """
        checkpoint = open_checkpoint(path, device, base=base, bits=bits, conv_mode=conv_mode)
        return cls(checkpoint, checkpoint.view(tiling))

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.checkpoint.name

    @property
    def model(self) -> Any:
        """The model."""
        return self.checkpoint.model

    @property
    def select(self) -> int:
        """The layer whose output goes to the projector, numbered from 1."""
        return read_geometry(self.checkpoint.vit).normalised(self.checkpoint.select_layer)

    def reads(self, by: PrunedBy) -> Needs:
        """What is read of the tower, whatever the budget; raises LayerError for others' layers."""
        pruning = Variant.of(by).pruning
        if pruning is None:
            return Needs()
        depth = read_geometry(self.checkpoint.vit).depth
        return pruning.method.reads(depth, self.select)

    def prompt(self, question: str) -> Tensor:
        """(1, L) token ids of a question about one image, in the conversation template."""
        return self.checkpoint.prompt(question)[None]

    def pixels(self, image: Any) -> Tensor:
        """What the model is given: (1, 3, H, W), or (1, tiles, 3, H, W) of AnyRes."""
        pixels = self.view.pixels(image).to(self.model.device, self.checkpoint.dtype)
        return pixels[None] if self.checkpoint.cuts_tiles else pixels

    @torch.inference_mode()
    def received_attention(
        self, image: Any, layers: tuple[int, ...] | None = None
    ) -> dict[int, Tensor]:
        """layer -> (tiles, N) float32, the received attention of some layers, of all by default.

        Layers past the one that goes to the projector influence nothing, and are not run. Raises
        LayerError for one of those or beyond.
        """
        wanted = layers or tuple(range(1, self.select + 1))
        wrong = [layer for layer in wanted if not 1 <= layer <= self.select]
        if wrong:
            raise LayerError(f"--layers {wrong[0]}: give layers from 1 to {self.select}, or all")
        vit, (device, dtype) = self.checkpoint.vit, self.checkpoint.tower
        geometry = read_geometry(vit)
        needs = Needs(received_attention=tuple(dict.fromkeys(wanted)))
        pixels = self.pixels(image).flatten(0, -4).to(device, dtype)
        hooks = QKHooks(layers_of(vit), needs)
        try:
            recorded = recording(needs, geometry.heads, geometry.patches)
            with torch.no_grad(), recorded as scores:
                hidden_states(vit, pixels, max(wanted))
        finally:
            hooks.remove()
        return {
            layer: scores.received_attention[layer].cpu()
            for layer in sorted(needs.received_attention)
        }

    @torch.inference_mode()
    def look(self, by: PrunedBy, image: Any, ids: Tensor) -> ImageReport:
        """What a method keeps of a picture, by the way that it takes in every command.

        For None all that unpruned LLaVA sends, in the one role `unpruned`.
        """
        variant = Variant.of(by)
        pruning = variant.pruning
        if pruning is None or not pruning.prunes:
            # With every patch kept a pruned model sends what stock LLaVA does.
            report = self.look(PruningConfig(Uniform(r_max=1), variant.runtime), image, ids)
            everything = Selection.from_roles({UNPRUNED: report.selection.keep})
            return replace(report, method="none", selection=everything)
        with self.checkpoint.pruned_by(variant) as pruned:
            if pruning.inside is not None:
                # What is left inside is known when the prompt has run there.
                self._generate(image, ids, 1)
                return pruned.last[0]
            self.checkpoint.prepare(ids, self.pixels(image), [image.size])
            return pruned.last[0]

    @torch.inference_mode()
    def answer(
        self, by: PrunedBy, image: Any, ids: Tensor, new_tokens: int
    ) -> tuple[str, ImageReport | None]:
        """The greedy answer, pruned by a method or (None) not, and what was kept for it."""
        with self.checkpoint.pruned_by(by) as pruning:
            out = self._generate(image, ids, new_tokens)
            text = self.checkpoint.tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
            return text, pruning.last[0] if pruning is not None else None

    def _generate(self, image: Any, ids: Tensor, new_tokens: int) -> Any:
        return self.checkpoint.generate(
            ids,
            images=self.pixels(image),
            image_sizes=[image.size],
            do_sample=False,
            max_new_tokens=new_tokens,
        )
