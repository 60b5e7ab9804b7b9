"""How related each patch is to the prompt, for prompt-aware methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_hvp.encoder.partitioned import gathered, loaded_whole
from llava_hvp.encoder.vit import transformer
from llava_hvp.errors import TextEncoderError


@dataclass
class ClipText:
    """CLIP's text encoder and both projections, from the vision tower's own checkpoint."""

    tokenizer: Any
    encoder: nn.Module
    text_projection: nn.Module
    visual_projection: nn.Module
    length: int

    @classmethod
    def load(cls, checkpoint: str) -> ClipText:
        """From a CLIP checkpoint's name or folder, in float32.

        Raises TextEncoderError where the checkpoint has no text encoder.
        """
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        remedy = (
            "use a tower whose checkpoint is a full CLIP model, or a method that does without, as "
            "hiprune++ with text='llm'"
        )
        try:
            config = AutoConfig.from_pretrained(checkpoint)
            if getattr(config, "text_config", None) is None or config.model_type != "clip":
                raise OSError(f"its model type is {config.model_type!r}")
            # Prompts differ in length from rank to rank, so that no rank may wait for another here.
            with loaded_whole():
                clip, report = CLIPModel.from_pretrained(checkpoint, output_loading_info=True)
            if report["missing_keys"]:
                raise OSError(f"it lacks {sorted(report['missing_keys'])[:3]} and more")
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
        except Exception as error:  # hub, file format, shapes: whatever it is, there is no encoder
            raise TextEncoderError(
                f"no CLIP text encoder in {checkpoint!r} ({error}): {remedy}"
            ) from error
        parts = clip.text_model, clip.text_projection, clip.visual_projection
        parts = tuple(part.eval().requires_grad_(False).float() for part in parts)
        return cls(tokenizer, *parts, clip.config.text_config.max_position_embeddings)

    def check(self, tower: nn.Module) -> None:
        """Raise TextEncoderError where a tower's features are not as wide as this CLIP's."""
        (width,) = transformer(tower).post_layernorm.normalized_shape  # the weight may be elsewhere
        weight: Any = self.visual_projection.weight
        own = weight.shape[1]
        if width != own:
            raise TextEncoderError(
                f"the CLIP of this text encoder has a vision tower {own} wide, and the model's is "
                f"{width}: name the one that the model's tower came from, as prune(model, method, "
                "clip_text='name or folder') or --prune-opt clip_text=…"
            )

    def to(self, device: torch.device) -> ClipText:
        """On another device, in place."""
        for module in (self.encoder, self.text_projection, self.visual_projection):
            module.to(device)
        return self

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """(P,) float32: the prompt's projected embedding, one a 77-token chunk, averaged."""
        inner = self.length - 2
        # Not verbose, as it would warn of prompts over 77 tokens: chunks are how we meet them.
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        device = next(self.encoder.parameters()).device
        embeddings = [
            self.text_projection(
                self.encoder(
                    input_ids=torch.tensor([[start, *ids[at : at + inner], end]], device=device)
                ).pooler_output
            )
            for at in range(0, max(1, len(ids)), inner)
        ]
        return torch.cat(embeddings).mean(0)

    @torch.no_grad()
    def patches(self, tower: nn.Module, features: Tensor) -> Tensor:
        """(T, N, P) float32: patch features in the space that CLIP shares with its text."""
        norm = transformer(tower).post_layernorm
        weight, bias = norm.weight, norm.bias
        with gathered(weight, bias):
            normed = functional.layer_norm(
                features.float(), norm.normalized_shape, weight.float(), bias.float(), norm.eps
            )
        return self.visual_projection(normed)


@torch.no_grad()
def load_tokenizer(checkpoint: str, remedy: str, **options: Any) -> Any:
    """A language model's tokenizer; raises TextEncoderError with a remedy where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, **options)
    except Exception as error:  # hub, file format, missing library: there is no tokenizer
        raise TextEncoderError(
            f"no tokenizer to read the prompt with in {checkpoint!r} ({error}): {remedy}"
        ) from error


def cosine_relevance(patches: Tensor, prompts: Tensor) -> Tensor:
    """Cosine of each patch and its tile's prompt.

    Parameters
    ----------
    patches : Tensor
        (T, N, D) float
    prompts : Tensor
        (T, D) float, the prompt of each tile's image

    Returns
    -------
    (T, N) float32
    """
    return functional.cosine_similarity(patches.float(), prompts.float()[:, None], dim=-1)
