"""Tiny random models of transformers' LLaVA-OneVision and Qwen2.5-VL, and what they are asked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llava_hvp import HIVTP, HiPrune, Selection, prune

PADDING, IMAGE, VIDEO, FIRST_WORD = 0, 500, 501, 510
VOCABULARY = 600
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def words(count: int, seed: int) -> list[int]:
    """Ids of a text."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=random).tolist()


def spread(model: Any) -> Any:
    """The model with its towers' attention less even than fresh weights make it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv")) and parameter.ndim == 2:
                parameter *= 2
            if "position_embedding" in name or "patch_embed" in name:
                parameter *= 3
    return model.float().eval()


def batch(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Rows of ids, padded on one side, with their mask."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), PADDING), torch.zeros(len(rows), length).long()
    for row, (to, real) in zip(rows, zip(ids, mask, strict=True), strict=True):
        part = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        to[part], real[part] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Any], tokens: int = 6, **kwargs: Any) -> Tensor:
    """Greedy ids behind the prompt, always `tokens` of them."""
    given = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    ids = model.generate(**inputs, **{**given, **kwargs})
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return ids[:, inputs["input_ids"].shape[1] :]


def steps(model: Any, inputs: dict[str, Any], tokens: int = 6, **kwargs: Any) -> Tensor:
    """(B, tokens, V) logits of each step of `generate`, greedy: ids hardly feel a position."""
    given = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    output = model.generate(
        **inputs, **given, **kwargs, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits, dim=1)


def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    """Of a forward pass."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


class KeepEverything(HiPrune):
    """Goes the whole way, capture included, and keeps every patch. Not registered: no own name."""

    def choose(self, context: Any, budget: Any) -> Selection:
        scores = next(iter(context.received_attention.values()))
        keep = torch.ones_like(scores, dtype=torch.bool)
        none = torch.zeros_like(keep)
        return Selection.from_roles({"anchor": keep, "buffer": none, "register": none})


KEEPERS = {"r_max=1": HIVTP(r_max=1), "choose keeps all": KeepEverything(r_max=0.5)}


def assert_keeping_all_is_stock(model: Any, inputs: dict[str, Any]) -> None:
    """Logits and ids bit for bit, while pruned and after."""
    expected, ids = logits(model, inputs), generate(model, inputs)
    for keeper, method in KEEPERS.items():
        with prune(model, method) as pruned:
            assert torch.equal(expected, logits(model, inputs)), keeper
            assert torch.equal(ids, generate(model, inputs)), keeper
        assert all(r.kept_tokens == r.stock_tokens for r in pruned.last)
    assert torch.equal(expected, logits(model, inputs))


# LLaVA-OneVision

SIDE, PATCHES, DEPTH = 112, 8, 26


def onevision(seed: int = 0) -> Any:
    """8 x 8 patches a tile, 26 layers as SigLIP so400m has them there; tiles up to 4 x 4."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    sides = [SIDE * n for n in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=DEPTH,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = spread(LlavaOnevisionForConditionalGeneration(config))
    model.generation_config.pad_token_id = PADDING
    return model


def arrangement(size: tuple[int, int]) -> tuple[int, int]:
    """(down, across) of the tiles of a picture of (height, width)."""
    best = None
    for down in range(1, 5):
        for across in range(1, 5):
            scale = min(across * SIDE / size[1], down * SIDE / size[0])
            shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
            score = shown, -(across * down * SIDE * SIDE - shown)
            if best is None or score > best[0]:
                best = score, (down, across)
    assert best is not None
    return best[1]


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[range, range]:
    """Rows and columns of the mosaic that show the picture."""
    if size[1] / size[0] > columns / rows:
        padding = (rows - math.floor(round(size[0] * (columns / size[1]), 7))) // 2
        return range(padding, rows - padding), range(columns)
    padding = (columns - math.floor(round(size[1] * (rows / size[0]), 7))) // 2
    return range(rows), range(padding, columns - padding)


def shown_of(size: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of a picture's mosaic that stock sends."""
    down, across = arrangement(size)
    return unpadded(size, down * PATCHES, across * PATCHES)


def sent_of(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tokens that stock sends of a picture's mosaic: of large ones fewer."""
    rows, columns = (len(line) for line in shown_of(size))
    ratio = math.sqrt(rows * columns / (9 * PATCHES**2))
    return (rows, columns) if ratio <= 1.1 else (int(rows // ratio), int(columns // ratio))


def pictures(
    questions: list[tuple[list[tuple[int, int]], int]], side: str = "left", seed: int = 0
) -> dict[str, Any]:
    """What the processor gives for rows of pictures of (height, width), and words behind them."""
    random = torch.Generator().manual_seed(seed)
    rows, tiles, sizes = [], [], []
    for number, (held, count) in enumerate(questions):
        ids = words(4, number)
        for size in held:
            down, across = arrangement(size) if len(held) == 1 else (0, 0)
            lines, line = sent_of(size) if len(held) == 1 else (1, 0)
            ids += [IMAGE] * (PATCHES**2 + lines * (line + 1)) + words(2, number)
            tiles.append(torch.randn(1 + down * across, 3, SIDE, SIDE, generator=random))
            sizes.append(size)
        rows.append(ids + words(count, number + 10))
    given: dict[str, Any] = batch(rows, side)
    if tiles:
        most = max(len(stack) for stack in tiles)
        padded = [torch.cat((t, torch.zeros(most - len(t), 3, SIDE, SIDE))) for t in tiles]
        given["pixel_values"] = torch.stack(padded)
        given["image_sizes"] = torch.tensor(sizes)
        given["batch_num_images"] = torch.tensor([len(held) for held, _ in questions])
    return given


# Qwen2.5-VL

VISION_START = 502
MERGE, PATCH, WINDOW = 2, 14, 112
FULL_LAYERS = (8, 16, 24, 32)  # numbered from 1, as in the released checkpoints


def qwen(seed: int = 0) -> Any:
    """32 layers, four of them with full attention; windows of 4 x 4 tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_start_token_id": VISION_START,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [layer - 1 for layer in FULL_LAYERS],
            "window_size": WINDOW,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=False,
        pad_token_id=PADDING,
    )
    torch.manual_seed(seed)
    model = spread(Qwen2_5_VLForConditionalGeneration(config))
    model.generation_config.pad_token_id = PADDING
    return model


def grids(
    questions: list[tuple[list[tuple[int, int]], int]], side: str = "left", seed: int = 0
) -> dict[str, Any]:
    """What the processor gives for rows of images of (rows, columns) tokens, and words behind."""
    from llava_hvp.hosts.hf.versions import release

    random = torch.Generator().manual_seed(seed)
    rows, pixels, sizes = [], [], []
    for number, (held, count) in enumerate(questions):
        ids = words(4, number)
        for down, across in held:
            ids += [VISION_START] + [IMAGE] * (down * across) + words(2, number)
            patches = down * across * MERGE**2
            pixels.append(torch.randn(patches, 3 * 2 * PATCH**2, generator=random))
            sizes.append([1, down * MERGE, across * MERGE])
        rows.append(ids + words(count, number + 10))
    given: dict[str, Any] = batch(rows, side)
    if release() >= (5, 0):
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).long()
    if pixels:
        given["pixel_values"] = torch.cat(pixels)
        given["image_grid_thw"] = torch.tensor(sizes)
    return given
