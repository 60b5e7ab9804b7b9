"""What the methods keep of things, digits and background, and what the tower attends to.

    python eval_scripts/objects.py [--pictures 300] [--out FILE.md]

On held-out pictures of llava-shapes, where it is known what covers each patch: the why behind
`llava-hvp accuracy`.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_hvp import VisionMethod, list_methods
from llava_hvp.accuracy.exam import TEMPLATE
from llava_hvp.bench.machine import versions
from llava_hvp.checkpoints.viewer import Viewer
from llava_hvp.runtime import PruningConfig
from llava_hvp.shapes import checkpoint
from llava_hvp.shapes.drawing import draw
from llava_hvp.shapes.questions import held_out
from llava_hvp.shapes.scenes import Scene
from llava_hvp.tables import MARKDOWN, text_table
from training.pool import IGNORE, PATCHES, TEXT, View, labels

BUDGETS = (0.5, 0.25, 0.11)
ENOUGH = 0.25  # of a thing's patches


@dataclass(frozen=True)
class Known:
    """A held-out picture with a question on it, and what covers each patch.

    kinds : (N,) 0 for background, 1 for a thing, 2 for digits, IGNORE
    things : (N,) bool for each thing that covers a patch
    """

    picture: Any
    text: str
    kinds: Tensor
    things: list[Tensor]

    @classmethod
    def of(cls, scene: Scene, text: str) -> Known:
        picture = draw(scene)

        def cover(shown: Scene) -> Tensor:
            found = labels(View(shown, picture, (1, 1), (0, 0), True))["cover"]
            return torch.from_numpy(found.astype(np.int64))

        kinds = cover(scene)
        kinds = torch.where((kinds > 0) & (kinds < TEXT), 1, torch.where(kinds == TEXT, 2, kinds))
        alone = [cover(replace(scene, things=(thing,), number=None)) for thing in scene.things]
        things = [(mine > 0) & (mine != IGNORE) for mine in alone]
        return cls(picture, text, kinds, [thing for thing in things if thing.any()])


def held_out_pictures(count: int) -> list[Known]:
    """Held-out pictures, each different, with where their things lie."""
    texts: dict[Scene, str] = {}
    for scene, question in held_out(3 * count):
        texts.setdefault(scene, question.text)
    return [Known.of(*item) for item in itertools.islice(texts.items(), count)]


def above(scores: Tensor, mine: Tensor, other: Tensor) -> float:
    """How often a patch of `mine` scores higher than one of `other`, in percent."""
    return 100 * float((scores[mine][:, None] > scores[other]).float().mean())


def by_layer(viewer: Viewer, known: list[Known]) -> list[dict[str, str]]:
    """For each layer: how often things and digits receive more attention than background."""
    sums: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in known:
        for layer, received in viewer.received_attention(one.picture).items():
            for name, kind in (("things", 1), ("digits", 2)):
                if (one.kinds == kind).any():
                    sums[layer][name].append(above(received[0], one.kinds == kind, one.kinds == 0))
            best = torch.zeros(PATCHES, dtype=torch.bool)
            best[received[0].topk(PATCHES // 4).indices] = True
            sums[layer]["found"] += [100.0 * enough(best, thing) for thing in one.things]
    return [
        {
            "layer": str(layer),
            "things above background, %": f"{np.mean(values['things']):.1f}",
            "digits above background, %": f"{np.mean(values['digits']):.1f}",
            "things found by the best quarter, %": f"{np.mean(values['found']):.1f}",
        }
        for layer, values in sorted(sums.items())
    ]


def enough(kept: Tensor, thing: Tensor) -> bool:
    return float(kept[thing].float().mean()) >= ENOUGH


def by_method(viewer: Viewer, known: list[Known], pruning: PruningConfig) -> dict[str, str]:
    """What one method keeps of each kind of patch, and whose work that was."""
    kept: dict[str, list[float]] = defaultdict(list)
    roles: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3))
    for one in known:
        kinds = one.kinds
        report = viewer.look(pruning, one.picture, viewer.prompt(one.text))
        keep = report.selection.keep[0]
        for name, kind in (("background", 0), ("things", 1), ("digits", 2)):
            if (kinds == kind).any():
                kept[name].append(100 * float(keep[kinds == kind].float().mean()))
        kept["found"] += [100.0 * enough(keep, thing) for thing in one.things]
        for role, mask in report.selection.roles.items():
            roles[role] += torch.stack([(kinds[mask[0]] == kind).sum() for kind in range(3)])
    return {
        "method": pruning.name,
        "r_max": f"{pruning.method.r_max}",
        "things found, %": f"{np.mean(kept['found']):.1f}",
        "of thing patches, %": f"{np.mean(kept['things']):.1f}",
        "of digit patches, %": f"{np.mean(kept['digits']):.1f}",
        "of background, %": f"{np.mean(kept['background']):.1f}",
        "by role: on background / things / digits, a picture": "; ".join(
            f"{role} " + " / ".join(f"{n / len(known):.1f}" for n in counts.tolist())
            for role, counts in roles.items()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--out", type=Path, help="Markdown, as well as the terminal")
    found = parser.parse_args()
    known = held_out_pictures(found.pictures)
    with tempfile.TemporaryDirectory(prefix="llava-hvp-") as folder:
        viewer = Viewer.load(str(checkpoint(folder)), None, "cpu", bits=None, conv_mode=TEMPLATE)
        layers = by_layer(viewer, known)
        methods = [
            by_method(viewer, known, PruningConfig.of(name, r_max=r_max))
            for name in list_methods(VisionMethod)
            for r_max in BUDGETS
        ]
    command = shlex.join(["python", "eval_scripts/objects.py", *sys.argv[1:]])
    text = "\n\n".join(
        (
            f"    {command}",
            f"{versions()}; llava-shapes, {len(known)} held-out pictures.",
            "Received attention, layer by layer: how often a patch of a thing, or of the number, "
            "receives more than a patch of the background of its picture (50 would be chance), and "
            f"of how many things the best quarter of all patches holds at least {ENOUGH:.0%}.",
            text_table(layers, MARKDOWN),
            f"What is kept. A thing is found if at least {ENOUGH:.0%} of its patches are kept.",
            text_table(methods, MARKDOWN),
        )
    )
    print(text)
    if found.out:
        found.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
