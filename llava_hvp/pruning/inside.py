"""What a method inside the language model left of each image, read off the levels of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava_hvp.decoder.sequence import Level
from llava_hvp.pruning.layout import NEWLINE
from llava_hvp.pruning.report import ImageReport


def in_layers(
    reports: Sequence[ImageReport],
    tokens: Sequence[Tensor],
    rows: Sequence[Sequence[int]],
    sent: Sequence[Sequence[int]],
    levels: Sequence[Level],
    stages: Sequence[int],
    depth: int,
) -> list[ImageReport]:
    """The reports of a call, with what entered each layer.

    Parameters
    ----------
    reports, tokens : Sequence
        of each image, as in PackedImages
    rows, sent : Sequence[Sequence[int]]
        of each row of the batch its images, and how many tokens of each there were room for
    levels : Sequence[Level]
        of the prompt; a row may stand there several times
    stages : Sequence[int]
        layers that run before each stage
    """
    times = len(levels[0].lengths) // len(rows)
    columns, visual, merged = zip(*_on_cpu(levels), strict=True)
    found = [_gone(report, stages, depth) for report in reports]
    for row, (images, counts) in enumerate(zip(rows, sent, strict=True)):
        if not images:
            continue
        first = columns[0][row * times][visual[0][row * times]]
        owner = torch.full((levels[0].length,), -1)
        token = owner.clone()
        owner[first] = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        token[first] = torch.cat([torch.arange(count) for count in counts])
        own = [c[row * times][v[row * times]] for c, v in zip(columns, visual, strict=True)]
        placed = [~m[row * times][v[row * times]] for m, v in zip(merged, visual, strict=True)]
        for number, image in enumerate(images):
            entering = [int((owner[columns] == number).sum()) for columns in own]
            masks = []
            for stage in stages:
                level = _at(levels, stage)
                stayed = own[level][placed[level]]
                masks.append(
                    _patches(reports[image], tokens[image], token[stayed[owner[stayed] == number]])
                )
            found[image] = replace(
                reports[image],
                layer_tokens=tuple(entering[_at(levels, layer)] for layer in range(depth)),
                stages=tuple(masks),
                stage_layers=tuple(stages),
            )
    return found


def in_all_layers(
    reports: Sequence[ImageReport], stages: Sequence[int], depth: int
) -> list[ImageReport]:
    """The reports of a call of which every token goes through all layers."""
    return [
        replace(
            r,
            layer_tokens=(r.kept_tokens,) * depth,
            stages=(r.sent,) * len(stages),
            stage_layers=tuple(stages),
        )
        for r in reports
    ]


def _gone(report: ImageReport, stages: Sequence[int], depth: int) -> ImageReport:
    """The report of an image that no row has a place for."""
    nothing = torch.zeros_like(report.sent)
    return replace(
        report,
        layer_tokens=(0,) * depth,
        stages=(nothing,) * len(stages),
        stage_layers=tuple(stages),
    )


def _at(levels: Sequence[Level], layer: int) -> int:
    return max(number for number, level in enumerate(levels) if level.layer <= layer)


def _patches(report: ImageReport, tokens: Tensor, stayed: Tensor) -> Tensor:
    """(tiles, N) bool, the patches of the tokens that stayed."""
    patches = tokens[stayed]
    mask = torch.zeros_like(report.sent)
    mask.view(-1)[patches[patches > NEWLINE]] = True
    return mask


def _on_cpu(levels: Sequence[Level]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Columns, visual and merged of each level, in one transfer."""
    device = levels[0].columns.device
    parts = [
        torch.stack((level.columns, level.visual, level.merged)).to(device) for level in levels
    ]
    flat = torch.cat([part.flatten() for part in parts]).cpu()
    split = flat.split([part.numel() for part in parts])
    shaped = [flat.view(part.shape) for flat, part in zip(split, parts, strict=True)]
    return [(columns, visual.bool(), merged.bool()) for columns, visual, merged in shaped]
