"""Floating point operations of one image and prompt, worked out from the shapes.

Two conventions, since the papers' leaves much out. A product of (m, k) and (k, n) counts 2mkn;
normalisations, activations and softmax count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_hvp.checkpoints.geometry import LlavaGeometry


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
    visual_tokens: int,
    *,
    text_tokens: int,
    projected: int | None = None,
    tiles: int | None = None,
    layers_run: int | None = None,
    layers_read: int = 0,
    new_tokens: int = 1,
) -> Flops:
    """Every matrix product that is done, those of attention included.

    Attention products count whole, though a causal kernel may leave half of them out; logits are
    those of all prompt tokens, as LLaVA's forward asks for them.

    Parameters
    ----------
    visual_tokens : int
        that the language model gets
    text_tokens : int
        of the prompt
    projected : int | None
        patches that go through the projector; `visual_tokens` by default
    tiles : int | None
        that the encoder sees; the geometry's own by default
    layers_run : int | None
        of the encoder; up to the selected one by default (stock runs all)
    layers_read : int
        layers whose attention the method reads; each costs its q k^T a second time
    new_tokens : int
        of the answer
    """
    vision, language = geometry.vision, geometry.language
    tiles = geometry.tiles if tiles is None else tiles
    layers_run = vision.select if layers_run is None else layers_run
    projected = visual_tokens if projected is None else projected
    seen, wide = vision.patches + 1, vision.hidden
    scores = 2 * seen**2 * wide  # q k^T of all heads; probabilities times v cost as much
    layer = 2 * seen * (4 * wide**2 + 2 * wide * vision.mlp) + 2 * scores
    embedding = 2 * vision.patches * 3 * vision.patch**2 * wide
    prompt = visual_tokens + text_tokens
    per_token = 2 * (language.layers * language.layer_weights + language.hidden * language.vocab)
    attention = 4 * language.layers * language.hidden
    decoded = range(prompt + 1, prompt + new_tokens)
    return Flops(
        tower=tiles * (embedding + layers_run * layer),
        selection=tiles * layers_read * scores,
        projector=projected * 2 * (wide * language.hidden + language.hidden**2),
        prefill=prompt * per_token + attention * prompt**2,
        decode=sum(per_token + attention * length for length in decoded),
    )


def as_published(geometry: LlavaGeometry, visual_tokens: int, *, text_tokens: int = 49) -> float:
    """The papers' convention (HiPrune, Table 5): products with weights only, of the prefill.

    The whole tower and the projector on all patches, whatever is kept of them.
    """
    vision, language = geometry.vision, geometry.language
    wide = vision.hidden
    tower = vision.layers * (vision.patches + 1) * (4 * wide**2 + 2 * wide * vision.mlp)
    projector = vision.patches * (wide * language.hidden + language.hidden**2)
    weights = language.layers * language.layer_weights + language.hidden * language.vocab
    return 2.0 * (geometry.tiles * (tower + projector) + (visual_tokens + text_tokens) * weights)
