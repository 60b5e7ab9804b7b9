"""One page of HTML that holds everything: no network, no server, nothing beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_hvp.show.colours import REGIONS, colours_of, heat
from llava_hvp.show.frame import CUT, Panel, counts_of, states_of
from llava_hvp.show.heatmap import ends_of, even_shares
from llava_hvp.show.merging import merging_of
from llava_hvp.show.regions import HOW, region_colours
from llava_hvp.show.sheet import picture

TEMPLATE = Path(__file__).with_name("page.html")
QUALITY = 90  # of the photo's JPEG
LEVELS = 2**16 - 1  # that a score is told in, from its layer's least to its most


@dataclass(frozen=True)
class Shown:
    """A method at one budget.

    Parameters
    ----------
    label : str
        the budget, as r_max 0.5
    answer : str
        the model's, "" where none was asked
    """

    label: str
    report: Any
    answer: str = ""


@dataclass(frozen=True)
class MethodShown:
    """A method at every budget, most kept first.

    Parameters
    ----------
    layers : tuple[int, ...]
        whose received attention it goes by
    """

    name: str
    summary: str
    layers: tuple[int, ...]
    budgets: Sequence[Shown]


@dataclass(frozen=True)
class Page:
    """What the page tells.

    Parameters
    ----------
    title : str
        the picture's file name
    model : str
        the checkpoint's name
    panels : Sequence[Panel]
        of the picture, with its photo
    received : Mapping[int, Tensor]
        layer -> (tiles, N) float, of one layer or more
    notes : Sequence[str]
        lines about the picture
    prompt, unpruned : str
        the question and the unpruned model's answer, "" where none was asked
    """

    title: str
    model: str
    panels: Sequence[Panel]
    methods: Sequence[MethodShown]
    received: Mapping[int, Tensor]
    notes: Sequence[str] = ()
    prompt: str = ""
    unpruned: str = ""

    def render(self) -> str:
        """The whole page as HTML."""
        template = TEMPLATE.read_text(encoding="utf-8")
        policy = "; ".join(
            (
                "default-src 'none'",
                "img-src data:",
                f"style-src '{_hash_of('style', template)}'",
                f"script-src '{_hash_of('script', template)}'",
                "base-uri 'none'",
                "form-action 'none'",
            )
        )
        # Inside a script element only "<" can end it.
        data = json.dumps(self._data(), separators=(",", ":")).replace("<", "\\u003c")
        parts = {
            "POLICY": html.escape(policy),
            "TITLE": html.escape(f"{self.title}: what is kept"),
            "DATA": data,
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)

    def _data(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "model": self.model,
            "notes": list(self.notes),
            "prompt": self.prompt,
            "unpruned": self.unpruned,
            "patches": self.methods[0].budgets[0].report.grid[0]
            * self.methods[0].budgets[0].report.grid[1],
            "cut": CUT,
            "heat": _bytes(heat()),
            "ends": ends_of(torch.stack([even_shares(s) for s in self.received.values()])),
            "panels": [_panel(panel) for panel in self.panels],
            "layers": [_layer(number, scores) for number, scores in self.received.items()],
            "regions": REGIONS,
            "howMerged": HOW,
            "methods": [_method(method, self.panels) for method in self.methods],
        }


def _hash_of(element: str, template: str) -> str:
    """The hash by which a policy lets the template's one <style> or <script> in."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _bytes(values: Tensor) -> str:
    """Base64 of a tensor's bytes, little-endian."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _panel(panel: Panel) -> dict[str, Any]:
    file = io.BytesIO()
    picture(panel.seen()).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return {
        "name": panel.name or "the picture as the model sees it",
        "rows": panel.patches.shape[0],
        "columns": panel.patches.shape[1],
        "side": panel.side,
        "patches": _bytes(panel.patches.to(torch.int32)),
        "photo": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}",
    }


def _layer(number: int, scores: Tensor) -> dict[str, Any]:
    values = even_shares(scores)
    least, most = values.min().item(), values.max().item()
    levels = ((values - least) / max(most - least, 1e-6) * LEVELS).round().to(torch.int32)
    # torch before 2.3 has no uint16: the two bytes of each, low before high.
    pair = torch.stack((levels % 256, levels // 256), dim=-1).to(torch.uint8)
    return {"layer": number, "least": least, "most": most, "levels": _bytes(pair)} | {
        "brightest": ends_of(values)[1]
    }


def _merging(report: Any, panels: Sequence[Panel]) -> dict[str, Any] | None:
    """What tokens took in: a colour for each patch and, token by token, which patches."""
    merging = merging_of(report)
    if merging is None:
        return None
    colours = region_colours(merging, panels, report.sent.shape[1])
    # 0 for none, else the number of the colour, from 1.
    numbers = torch.zeros(len(merging.into), dtype=torch.uint8)
    for token, colour in colours.items():
        numbers[merging.into == token] = colour + 1
    counts = [len(members) for _, members in merging.flows]
    members = torch.cat([torch.empty(0, dtype=torch.int64), *(m for _, m in merging.flows)])
    return {
        "text": str(merging),
        "colours": _bytes(numbers),
        "held": _bytes(merging.held.to(torch.uint8)),
        "tokens": [token for token, _ in merging.flows],
        "counts": counts,
        "members": _bytes(members.to(torch.int32)),
    }


def _method(method: MethodShown, panels: Sequence[Panel]) -> dict[str, Any]:
    colours = colours_of(method.budgets[0].report.selection.roles)
    return {
        "name": method.name,
        "summary": method.summary,
        "layers": list(method.layers),
        "roles": [{"name": role, "colour": colour} for role, colour in colours.items()],
        "budgets": [
            {
                "label": shown.label,
                "states": _bytes(states_of(shown.report)),
                "counts": counts_of(shown.report),
                "merging": _merging(shown.report, panels),
                "kept": shown.report.kept_tokens,
                "stock": shown.report.stock_tokens,
                "keptPatches": shown.report.kept_patches,
                "allPatches": shown.report.sent.numel(),
                "answer": shown.answer,
            }
            for shown in method.budgets
        ],
    }
