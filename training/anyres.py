"""Stage 3: the same language model on LLaVA-NeXT's layout, for pictures larger than one tile.

Features of all tiles come from the frozen tower and are computed once. A picture is its base tile,
then the sub-images as one mosaic without padding, an `image_newline` after each row: the indices
are those that `llava_hvp.pruning.layout` gives for stock LLaVA.

    python -m training.anyres TOWER_FOLDER LANGUAGE_FOLDER OUT
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from llava_hvp.hosts.llava.tiling import TilingConfig, layout
from llava_hvp.pruning.layout import NEWLINE
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.exams import detail_recipe
from llava_hvp.shapes.scenes import Recipe, Scene, make_scene, split_of
from training.language import LANGUAGE, STATE, Asker, add_asker_options, answer_loss, load_tower
from training.llama import Language
from training.loop import add_options, train
from training.models import Masters, Vision
from training.pool import GRID, PATCHES, SIDE, to_patches
from training.prompts import VOCABULARY, Prompts
from training.tower import WIDTH, normalise

PINPOINTS = [[SIDE * w, SIDE * h] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
ARRANGEMENT = TilingConfig("spatial_unpad", "anyres", str(PINPOINTS), (GRID, GRID), SIDE)
# Width, height, and how often.
SIZES = (
    ((336, 168), 3),
    ((168, 336), 3),
    ((300, 160), 1),
    ((150, 310), 1),
    ((336, 336), 2),
    ((300, 240), 1),
    ((240, 320), 1),
    ((168, 168), 2),
)
ROOMS = (PATCHES + 312, PATCHES + 600)  # tokens that a picture is filled up to


def tiles_of(picture: Image.Image) -> np.ndarray:
    """(tiles, 144, 588) uint8: what LLaVA's process_anyres_image gives, as patches."""
    from llava.mm_utils import divide_to_patches, resize_and_pad_image, select_best_resolution

    best = select_best_resolution(picture.size, [tuple(p) for p in PINPOINTS])
    parts = divide_to_patches(resize_and_pad_image(picture, best), SIDE)
    return np.stack([to_patches(part) for part in (picture.resize((SIDE, SIDE)), *parts)])


def tokens_of(size: tuple[int, int], tiles: int) -> Tensor:
    """(n,) int64: patches, `tile * 144 + patch`, and NEWLINE, in stock LLaVA's order."""
    everything = torch.ones(tiles * PATCHES, dtype=torch.bool)
    return layout(ARRANGEMENT, tiles, size, "stock").kept(everything, "all")


class Album:
    """Scenes with the features of their tiles, by the room that their tokens need."""

    def __init__(self, tower: Vision, count: int, first: int) -> None:
        self.scenes: list[Scene] = []
        self.features: list[Tensor] = []  # (tiles * 144, width) float16
        self.tokens: list[Tensor] = []
        sizes = [size for size, weight in SIZES for _ in range(weight)]
        seed = first
        while len(self.scenes) < count:
            size = Random(f"size {seed}").choice(sizes)
            scene = make_scene(seed, Recipe() if size == (SIDE, SIDE) else detail_recipe(size))
            seed += 1
            if split_of(scene) != "train":
                continue
            picture = draw(scene)
            tiles = tiles_of(picture)
            with torch.no_grad():
                features = tower.features(normalise(tiles)).flatten(0, 1)
            self.scenes.append(scene)
            self.features.append(features.half())
            self.tokens.append(tokens_of(picture.size, len(tiles)))
        lengths = np.array([len(tokens) for tokens in self.tokens])
        self.rooms = [
            np.flatnonzero((lengths <= room) & (lengths > low))
            for low, room in zip((0, *ROOMS), ROOMS, strict=False)
        ]

    def picture(self, model: Language, rows: np.ndarray, room: int) -> Tensor:
        """(B, room, width) embeddings as LLaVA packs them, filled up with newlines."""
        tokens = [
            F.pad(self.tokens[r], (0, room - len(self.tokens[r])), value=NEWLINE) for r in rows
        ]
        # The newline stands behind the last patch, where index -1 finds it.
        features = [F.pad(self.features[r].to(model.newline.dtype), (0, 0, 0, 1)) for r in rows]
        packed = torch.stack([own[at] for own, at in zip(features, tokens, strict=True)])
        is_newline = (torch.stack(tokens) == NEWLINE)[..., None]
        return torch.where(is_newline, model.newline, model.picture(packed))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune on LLaVA-NeXT's layout.")
    parser.add_argument("tower", type=Path, help="what training.tower wrote")
    parser.add_argument("language", type=Path, help="what training.language wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=5000, help="pictures")
    parser.add_argument("--first", type=int, default=800_000_000, help="first seed")
    add_asker_options(parser)
    add_options(parser, minutes=16, batch=16, rate=6e-4)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    draw_rows = np.random.RandomState(options.seed + 2)
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.language / "tokenizer.model", options.out)
    asker = Asker(Prompts(options.out), options.room, options.jitter, options.seed + 3)
    model = Language(VOCABULARY, WIDTH, **LANGUAGE)
    model.load_state_dict(torch.load(options.language / STATE))
    masters = Masters(model)
    album = Album(load_tower(options.tower), options.count, options.first)
    by_room = [len(rows) for rows in album.rooms]
    print(f"{len(album.scenes)} pictures, by room: {by_room}", flush=True)
    forward = torch.compile(model, dynamic=False)

    def step(done: float) -> tuple[Tensor, int, dict[str, float]]:
        which = draw_rows.choice(len(ROOMS), p=np.array(by_room) / len(album.scenes))
        # Four tiles and more take half a batch.
        rows = draw_rows.choice(album.rooms[which], options.batch >> which, replace=False)
        scenes = [album.scenes[row] for row in rows]
        batch, turns = asker.batch(scenes, [len(album.tokens[r]) for r in rows], ROOMS[which])
        picture = album.picture(model, rows, ROOMS[which])
        loss, right = answer_loss(model, batch, turns, picture, forward)
        return loss, len(rows), right

    train(options, "anyres.csv", STATE, masters, step)


if __name__ == "__main__":
    main()
