"""Bytes that an answer takes on its device, worked out from the shapes, before anything is loaded.

Of LLaVA's own classes, as transformers from 4.57 on runs them, with a fused attention; what is held
at once was read off torch's allocator. Counts of tokens are the most that a picture can have: one
that AnyRes cuts into all its tiles without a margin, and every method's whole budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llava_hvp.checkpoints.geometry import LlavaGeometry, Vision
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.encoder.capture import CHUNK, CHUNK_ELSEWHERE
from llava_hvp.methods.base import Needs
from llava_hvp.runtime import PruningConfig

MOST = 4096  # positions that LLaVA's prompts are cut at; no batch is looked for beyond it either
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Layout:
    """In what a model's weights and states lie.

    Parameters
    ----------
    element, tower : int
        bytes of a number, of the language model and of the vision tower
    four_bit : bool
        whether matrices are quantised, the tower's too where it comes with the checkpoint
    device : str
        "cuda" or "cpu", which read attention in chunks of unlike size
    """

    element: int
    tower: int
    four_bit: bool = False
    device: str = "cuda"

    def matrices(self, numbers: int, count: int, element: int) -> int:
        """Bytes of `count` matrices of `numbers` numbers in all."""
        if self.four_bit:
            # A scale of a byte for 64 numbers, one of float32 for 256 of those, and the tables.
            return (
                numbers // 2 + numbers // 64 + FLOAT * (numbers // 2**14 + (256 + 16 + 1) * count)
            )
        return numbers * element


@dataclass(frozen=True)
class Memory:
    """Bytes of a batch.

    Parameters
    ----------
    inputs : int
        the images, which stay through the answer
    encode, prefill, decode : int
        the most that is held at once in each phase, beside weights and inputs
    """

    weights: int
    inputs: int
    encode: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.inputs + max(self.encode, self.prefill, self.decode)


def visual_tokens(geometry: LlavaGeometry, pruning: PruningConfig | None) -> list[int]:
    """At most so many visual tokens of an image enter each layer of the language model."""
    vision, depth = geometry.vision, geometry.language.layers
    kept = vision.patches * geometry.tiles
    if pruning is not None:
        budget = pruning.method.budget(vision.patches, geometry.tiles)
        kept = budget if pruning.method.of_image else budget * geometry.tiles
    if geometry.is_next:  # a newline behind each row of the mosaic
        across = round((geometry.tiles - 1) ** 0.5)
        kept += min(kept, across * (vision.image // vision.patch))
    entering, inside = [kept] * depth, None if pruning is None else pruning.inside
    if inside is not None:
        for stage, count in zip(inside.stages(depth), inside.counts(kept, depth), strict=True):
            entering[stage.layer :] = [count] * (depth - stage.layer)
    return entering


def memory(
    geometry: LlavaGeometry,
    variant: Variant,
    layout: Layout,
    *,
    batch: int,
    text_tokens: int,
    new_tokens: int,
) -> Memory:
    """Of a batch of prompts with an image each, answered by so many tokens.

    Parameters
    ----------
    text_tokens : int
        of a prompt, beside its image
    """
    vision, language = geometry.vision, geometry.language
    needs = variant.needs(vision) if variant.prunes else Needs()
    entering = [v + text_tokens for v in visual_tokens(geometry, variant.pruning)]
    pixels = batch * geometry.tiles * 3 * vision.image**2
    kept = batch * (entering[0] - text_tokens)
    prompt, answered = sum(entering), sum(entering) + language.layers * new_tokens
    per_token = 2 * language.hidden * language.kv_heads // language.heads * layout.element
    unpacked = max(language.hidden, language.mlp) * language.hidden * layout.element
    # On a GPU a matrix is unpacked for each product.
    spare = unpacked if layout.four_bit and layout.device == "cuda" else 0
    wide = _of_token(geometry, layout)
    cached, prefill = 0, 0
    for tokens in entering:
        cached += batch * tokens * per_token
        prefill = max(prefill, cached + batch * tokens * wide + spare)
    logits = batch * entering[-1] * (language.vocab + language.hidden) * layout.element
    embeds = 2 * batch * entering[0] * language.hidden * layout.element  # they wait in `generate`
    # A layer's cache is copied as it grows; grouped keys and values are spread over all heads.
    copied = 2 * batch * (entering[0] + new_tokens) * language.hidden * layout.element
    return Memory(
        weights=weights(geometry, layout) + text_encoder(vision, needs),
        inputs=pixels * layout.element,
        encode=_encode(geometry, variant, needs, layout, batch, kept),
        prefill=max(prefill, batch * prompt * per_token + logits) + embeds,
        decode=batch * answered * per_token + copied + spare,
    )


def _of_token(geometry: LlavaGeometry, layout: Layout) -> int:
    """Bytes of a token in the widest step of a decoder layer, its MLP."""
    language = geometry.language
    states = 3 * language.hidden + 2 * language.hidden // language.heads + 2
    return (3 * language.mlp + states) * layout.element


def _encode(
    geometry: LlavaGeometry,
    variant: Variant,
    needs: Needs,
    layout: Layout,
    batch: int,
    kept: int,
) -> int:
    """Peak of the image encode: a layer's MLP, the reading of attention, or the projector."""
    vision, width = geometry.vision, geometry.language.hidden
    tiles, seen = batch * geometry.tiles, vision.patches + 1
    states = tiles * seen * vision.hidden * layout.tower
    pixels = tiles * 3 * vision.image**2
    copies = pixels * layout.tower * (layout.tower != layout.element)
    copies += pixels * layout.element * geometry.is_next  # tiles of all images in one tensor
    # LLaVA asks for the states of all layers, and uses those of one.
    held = 0 if variant.prunes else (vision.layers - 1) * states
    mlp = 3 * tiles * seen * vision.mlp * layout.tower
    peaks = [held + 3 * states + mlp]
    if needs.received_attention or needs.cls_attention:
        entries = min(CHUNK.get(layout.device, CHUNK_ELSEWHERE), tiles * vision.heads * seen**2)
        entries = max(entries, vision.heads * seen)
        both = 2 * tiles * seen * vision.hidden * FLOAT  # q and k
        peaks.append(4 * states + both + 2 * entries * FLOAT)
    peaks[:] = [peak + len({*needs.keys, *needs.queries}) * states for peak in peaks]
    features = tiles * vision.patches * vision.hidden * layout.tower
    peaks.append(features + 3 * kept * width * layout.element)
    if needs.projected:
        every = tiles * vision.patches * width
        peaks.append(features + every * (layout.element + 2 * FLOAT))
    return max(peaks) + copies


def weights(geometry: LlavaGeometry, layout: Layout) -> int:
    """Bytes of the weights."""
    vision, language = geometry.vision, geometry.language
    wide, seen = language.hidden, vision.patches + 1
    decoder = layout.matrices(
        language.layers * language.layer_weights, language.layers * 7, layout.element
    )
    plain = 2 * language.vocab * wide + (2 * language.layers + 1) * wide
    projector = layout.matrices(vision.hidden * wide + wide**2, 2, layout.element)
    plain += (2 + geometry.is_next) * wide  # biases, and a newline
    # LLaVA-1.5 loads its tower from a checkpoint of its own, past the quantising.
    tower = layout if geometry.is_next else Layout(layout.element, layout.tower)
    matrices = tower.matrices(
        vision.layers * (4 * vision.hidden**2 + 2 * vision.hidden * vision.mlp),
        vision.layers * 6,
        layout.tower,
    )
    of_layer = 9 * vision.hidden + vision.mlp  # biases and norms
    embeddings = (3 * vision.patch**2 + 1 + seen + 4) * vision.hidden
    rest = (vision.layers * of_layer + embeddings) * layout.tower + 8 * seen
    return decoder + plain * layout.element + projector + matrices + rest


def text_encoder(vision: Vision, needs: Needs) -> int:
    """Bytes of CLIP's text side, for methods that read the prompt with it; 0 for others."""
    if needs.relevance != "clip":
        return 0
    wide = 768 if vision.hidden == 1024 else vision.hidden
    layers = vision.layers // 2
    numbers = (49408 + 77 + 2) * wide + layers * (12 * wide**2 + 13 * wide)
    return FLOAT * (numbers + wide**2 + wide * vision.hidden)


def most(fits: Callable[[int], bool], limit: int = MOST) -> int:
    """The largest number up to `limit` that fits, where all below it do; 0 where none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
