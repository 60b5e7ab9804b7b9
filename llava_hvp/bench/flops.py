"""Floating point operations of one image and prompt, worked out from the shapes.

Two conventions, since the papers' leaves much out. A product of (m, k) and (k, n) counts 2mkn;
normalisations, activations and softmax count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_hvp.checkpoints.geometry import Language, LlavaGeometry
from llava_hvp.methods.language import LanguageMethod


@dataclass(frozen=True)
class Flops:
    """FLOPs of one answer, by phase.

    Parameters
    ----------
    decode : float
        of all new tokens but the first, which the prefill brings
    """

    tower: float
    selection: float
    projector: float
    prefill: float
    decode: float

    @property
    def to_first_token(self) -> float:
        """All that is done before the first token."""
        return self.tower + self.selection + self.projector + self.prefill


def complete(
    geometry: LlavaGeometry,
    visual_tokens: int | Sequence[int],
    *,
    text_tokens: int,
    projected: int | None = None,
    tiles: int | None = None,
    layers_run: int | None = None,
    layers_read: int = 0,
    inside: LanguageMethod | None = None,
    text_behind: int | None = None,
    new_tokens: int = 1,
) -> Flops:
    """Every matrix product that is done, those of attention included.

    Attention products count whole, though a causal kernel may leave half of them out; logits are
    those of all prompt tokens, as LLaVA's forward asks for them.

    Parameters
    ----------
    visual_tokens : int | Sequence[int]
        that the language model gets, or those that enter each of its layers
    text_tokens : int
        of the prompt
    projected : int | None
        patches that go through the projector; by default what the language model gets
    tiles : int | None
        that the encoder sees; the geometry's own by default
    layers_run : int | None
        of the encoder; up to the selected one by default (stock runs all)
    layers_read : int
        layers whose attention the method reads; each costs its q k^T a second time
    inside : LanguageMethod | None
        what drops visual tokens inside the language model; a stage that drops none costs nothing
    text_behind : int | None
        tokens of the prompt behind the images, of which some score; all of it by default
    new_tokens : int
        of the answer
    """
    vision, language = geometry.vision, geometry.language
    tiles = geometry.tiles if tiles is None else tiles
    layers_run = vision.select if layers_run is None else layers_run
    per_layer = _entering(visual_tokens, language.layers)
    projected = per_layer[0] if projected is None else projected
    seen, wide = vision.patches + 1, vision.hidden
    scores = 2 * seen**2 * wide  # q k^T of all heads; probabilities times v cost as much
    layer = 2 * seen * (4 * wide**2 + 2 * wide * vision.mlp) + 2 * scores
    embedding = 2 * vision.patches * 3 * vision.patch**2 * wide
    prompt = [visual + text_tokens for visual in per_layer]
    of_layer, of_logits = 2 * language.layer_weights, 2 * language.hidden * language.vocab
    attention = 4 * language.hidden
    raters = text_tokens if text_behind is None else text_behind
    choice = 0.0 if inside is None else _choice(language, inside, prompt, raters)
    per_token = language.layers * of_layer + of_logits
    return Flops(
        tower=tiles * (embedding + layers_run * layer),
        selection=tiles * layers_read * scores + choice,
        projector=projected * 2 * (wide * language.hidden + language.hidden**2),
        prefill=sum(of_layer * n + attention * n**2 for n in prompt) + of_logits * prompt[-1],
        decode=sum(
            per_token + attention * sum(n + later for n in prompt) for later in range(1, new_tokens)
        ),
    )


def _entering(visual_tokens: int | Sequence[int], layers: int) -> list[int]:
    """Visual tokens that enter each layer."""
    if isinstance(visual_tokens, int):
        return [visual_tokens] * layers
    return list(visual_tokens)


def _choice(
    language: Language, method: LanguageMethod, prompt: Sequence[int], raters: int
) -> float:
    """What scoring at the stages costs; of merging only the means are products.

    Parameters
    ----------
    prompt : Sequence[int]
        tokens that enter each layer
    raters : int
        query rows of a stage that reads them
    """
    wide, keys = language.hidden, language.hidden * language.kv_heads // language.heads
    stages = method.stages(language.layers)
    # Which of them rate is asked once, by the embeddings of all tokens.
    total = 2.0 * prompt[0] ** 2 * wide * any(stage.reads == "raters" for stage in stages)
    for stage in stages:
        before, after = prompt[stage.layer - 1], prompt[stage.layer]
        if after == before:
            continue
        rows = 1 if stage.reads == "last" else raters
        total += 2 * rows * before * wide
        if method.reads_rope:
            total += 2 * rows * before * wide // language.heads
        if stage.of == "next":
            total += 2 * wide * (rows * wide + before * keys)
    return total


def as_published(
    geometry: LlavaGeometry, visual_tokens: int | Sequence[int], *, text_tokens: int = 49
) -> float:
    """The papers' convention (HiPrune, Table 5): products with weights only, of the prefill.

    The whole tower and the projector on all patches, whatever is kept of them. `visual_tokens` are
    as for `complete`.
    """
    vision, language = geometry.vision, geometry.language
    wide = vision.hidden
    tower = vision.layers * (vision.patches + 1) * (4 * wide**2 + 2 * wide * vision.mlp)
    projector = vision.patches * (wide * language.hidden + language.hidden**2)
    per_layer = _entering(visual_tokens, language.layers)
    layers = sum(visual + text_tokens for visual in per_layer) * language.layer_weights
    logits = (per_layer[-1] + text_tokens) * language.hidden * language.vocab
    return 2.0 * (geometry.tiles * (tower + projector) + layers + logits)
