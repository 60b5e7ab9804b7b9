"""Stage 1: the vision tower and its text encoder, on what covers each patch and on captions.

python -m training.tower POOL OUT --easy EASY_POOL --text TEXT_POOL
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from llava_hvp.shapes.scenes import NAMES
from llava_hvp.testing.tokenizers import write_clip_tokenizer
from training.captions import Vocabulary, caption, class_prompts, word_list
from training.loop import add_options, batches, train
from training.models import Masters, Text, Vision
from training.pool import GRID, IGNORE, MAX_DIGITS, PATCHES, TEXT, open_pool

WIDTH, HEADS, INNER, LAYERS = 128, 4, 512, 12
STATE = "tower.pt"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).repeat_interleave(196) * 255
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).repeat_interleave(196) * 255
# Columns of the patch head.
HEAD = {
    "cover": len(NAMES) + 2,
    "glyph": 10,
    "digits": 11 * MAX_DIGITS,
    "left": len(NAMES) + 1,
    "row": GRID,
    "column": GRID,
    "offset": 2,
}
WEIGHTS = {"glyph": 1.5, "left": 0.5, "digits": 1.5}


def normalise(pixels: np.ndarray, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """uint8 patches as the image processor gives them."""
    return torch.from_numpy(pixels).float().sub_(MEAN).div_(STD).to(dtype)


class Supervised(nn.Module):
    """The tower with the heads that teach it; only tower and text encoder are kept."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision = Vision(WIDTH, HEADS, INNER, LAYERS, GRID)
        self.text = Text(vocabulary, WIDTH, HEADS, INNER, 2)
        self.patch_norm, self.cls_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patch_head = nn.Linear(WIDTH, sum(HEAD.values()))
        self.cls_head = nn.Linear(WIDTH, len(NAMES) + 4 * 5)

    def image(self, pixels: Tensor, keep: Tensor | None) -> tuple[Tensor, ...]:
        """Logits of patches and of CLS, embeddings of patches and of the picture."""
        deep, last = self.vision(pixels, keep)
        vision = self.vision
        return (
            self.patch_head(self.patch_norm(deep[:, 1:])),
            self.cls_head(self.cls_norm(last[:, 0])),
            vision.project(vision.after(deep[:, 1:])),
            vision.project(vision.after(last[:, 0])),
        )


def choose(cover: Tensor, share: float) -> Tensor | None:
    """(B, n) sorted indices of patches to see: every thing's, and part of the background."""
    if share >= 1:
        return None
    chance = torch.rand(cover.shape) + (cover != 0) * 2
    return chance.topk(round(share * PATCHES), 1).indices.sort(1).values


def losses(
    model: Supervised,
    batch: dict[str, Tensor],
    outputs: tuple[Tensor, ...],
    texts: tuple[Tensor, ...],
) -> tuple[Tensor, dict[str, float]]:
    """The sum of all terms, and measures to report."""
    patch, cls, patch_embedding, image_embedding = outputs
    part = dict(zip(HEAD, patch.float().flatten(0, 1).split(list(HEAD.values()), 1), strict=True))
    cover = batch["cover"].flatten()
    seen = (cover != IGNORE).nonzero()[:, 0]
    truth = cover[seen]
    thing = truth > 0
    each = F.cross_entropy(part["cover"][seen], truth, reduction="none")
    terms = {"cover": (each * (0.3 + 0.7 * thing)).sum() / (0.3 + 0.7 * thing).sum() * 1.5}
    measures = {
        "patches": float((part["cover"][seen].argmax(1) == truth)[thing].float().mean()),
        "background": float((part["cover"][seen].argmax(1) == truth)[~thing].float().mean()),
    }
    for name in ("glyph", "left"):
        truth = batch[name].flatten()
        rows = (truth != IGNORE).nonzero()[:, 0]
        if len(rows):
            terms[name] = F.cross_entropy(part[name][rows], truth[rows]) * WEIGHTS[name]
            hit = part[name][rows].argmax(1) == truth[rows]
            some = hit[truth[rows] > 0] if name == "left" else hit
            measures[name] = float(some.float().mean()) if len(some) else 0.0
    truth = batch["digits"].flatten(0, 1)
    rows = (truth[:, 0] != IGNORE).nonzero()[:, 0]
    if len(rows):
        logits = part["digits"][rows].view(-1, 11)
        terms["digits"] = F.cross_entropy(logits, truth[rows].flatten()) * WEIGHTS["digits"]
        hit = logits.argmax(1).view(-1, MAX_DIGITS) == truth[rows]
        measures["digits"] = float(hit.all(1).float().mean())
    index = batch["index"].flatten()
    terms["row"] = F.cross_entropy(part["row"], index // GRID) * 0.1
    terms["column"] = F.cross_entropy(part["column"], index % GRID) * 0.1
    on_thing = ((cover > 0) & (cover < TEXT)).nonzero()[:, 0]
    offset = batch["offset"].flatten(0, 1)[on_thing] / 14
    terms["offset"] = F.smooth_l1_loss(part["offset"][on_thing], offset) * 0.5

    present = batch["present"]
    cls = cls.float()
    terms["present"] = (
        F.binary_cross_entropy_with_logits(cls[:, : len(NAMES)], (present > 0).float()) * 1.5
    )
    counts = present.view(-1, len(NAMES) // 4, 4).sum(1).clamp(max=4)
    logits = cls[:, len(NAMES) :].view(-1, 4, 5)
    terms["counts"] = F.cross_entropy(logits.flatten(0, 1), counts.flatten()) * 0.3
    measures["counts"] = float((logits.argmax(-1) == counts).float().mean())

    captions, prompts = texts
    scale = model.text.scale.float().exp().clamp(max=100)
    image = F.normalize(image_embedding.float(), dim=-1)
    logits, own = scale * image @ captions.T, torch.arange(len(image))
    terms["caption"] = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) * 0.25
    measures["caption"] = float((logits.argmax(1) == own).float().mean())
    named = ((cover > 0) & (cover != IGNORE)).nonzero()[:, 0]
    patches = F.normalize(patch_embedding.flatten(0, 1)[named].float(), dim=-1)
    logits = scale * patches @ prompts.T
    terms["prompt"] = F.cross_entropy(logits, cover[named] - 1) * 0.5
    measures["prompt"] = float((logits.argmax(1) == cover[named] - 1).float().mean())
    total = torch.stack(list(terms.values())).sum()
    return total, measures


def read(pool: dict[str, np.ndarray], rows: np.ndarray, share: float) -> dict[str, Tensor]:
    batch = {
        name: torch.from_numpy(pool[name][rows]).long()
        for name in ("cover", "glyph", "left", "offset", "digits", "present")
    }
    pixels = normalise(pool["pixels"][rows])
    batch["index"] = torch.arange(PATCHES).expand(len(rows), -1)
    keep = choose(batch["cover"], share)
    if keep is not None:
        for name in ("cover", "glyph", "left", "index"):
            batch[name] = batch[name].gather(1, keep)
        for name in ("offset", "digits"):
            wide = keep[..., None].expand(-1, -1, batch[name].shape[-1])
            batch[name] = batch[name].gather(1, wide)
        pixels = pixels.gather(1, keep[..., None].expand(-1, -1, pixels.shape[-1]))
        batch["keep"] = keep
    return batch | {"pixels": pixels}


def scene_captions(pool: dict[str, np.ndarray], rows: np.ndarray, random: Random) -> list[str]:
    """From what a picture shows, which for a tile is less than its scene."""
    texts = []
    for present, digits in zip(pool["present"][rows], pool["number"][rows], strict=True):
        things = [n for n, count in zip(NAMES, present, strict=True) for _ in range(count)]
        number = "".join(str(d) for d in digits if d < 10)
        texts.append(caption(things, number, random))
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the vision tower.")
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--easy", type=Path, required=True, help="a pool to begin with")
    parser.add_argument("--text", type=Path, required=True, help="a pool for a quarter of a batch")
    parser.add_argument("--easy-steps", type=int, default=250)
    parser.add_argument("--share", type=float, default=0.65, help="of the patches, at first")
    parser.add_argument("--all-patches", type=float, default=0.7, help="from this share of time")
    add_options(parser, minutes=40, batch=96, rate=1.5e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    random, draw = Random(options.seed), np.random.RandomState(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    size = write_clip_tokenizer(options.out, text=word_list())
    vocabulary = Vocabulary(options.out)
    model = Supervised(size)
    masters = Masters(model)
    image = torch.compile(model.image, dynamic=False)
    sizes = {"easy": options.batch, "pool": options.batch, "text": options.batch // 3}
    pools = {name: open_pool(vars(options)[name]) for name in sizes}
    drawn = {
        name: batches(np.arange(len(pools[name]["seed"])), size, draw)
        for name, size in sizes.items()
    }
    numbers = itertools.count()

    def step(done: float) -> tuple[Tensor, int, dict[str, float]]:
        share = options.share if done < options.all_patches else 1.0
        now = ("easy" if next(numbers) < options.easy_steps else "pool", "text")
        parts = [(pools[name], next(drawn[name])) for name in now]
        tensors = [read(pool, rows, share) for pool, rows in parts]
        batch = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
        texts = [text for pool, rows in parts for text in scene_captions(pool, rows, random)]
        captions = model.text(*vocabulary.encode(texts))
        prompts = model.text(*vocabulary.encode(class_prompts(random)))
        outputs = image(batch["pixels"], batch.get("keep"))
        loss, measures = losses(model, batch, outputs, (captions, prompts))
        return loss, len(texts), measures

    train(options, "tower.csv", STATE, masters, step)


if __name__ == "__main__":
    main()
