"""HiPrune++: HiPrune with a share of the budget for what the prompt asks about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from llava_hvp.errors import OptionError
from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext
from llava_hvp.methods.checks import choice, number
from llava_hvp.methods.hiprune import HiPrune
from llava_hvp.methods.masks import top_k
from llava_hvp.methods.worth import Values, WorthTrying


@dataclass(frozen=True, kw_only=True)
class HiPrunePlus(HiPrune):
    """HiPrune++ (arXiv 2508.00553, the prompt-aware variant).

    As HiPrune, but registers stop at the budget less `round(beta * budget)`, and the patches most
    related to the prompt fill it up. The paper's pseudo-code adds them on top; its measured FLOPs
    (Table 5) have them inside the budget, and so have we.

    Parameters
    ----------
    beta : float
        share of the budget for the prompt, in [0, 1]
    text : str
        "clip" compares with CLIP's text encoder of the tower's own checkpoint; "llm" with the
        language model's input embeddings, for a tower that has no text encoder (this projects every
        patch, where all else projects only the kept ones)
    extra : bool
        put the prompt's patches on top of the budget
    sign : str
        "direct" takes the patches whose cosine with the prompt is largest, as the paper says;
        "negated" the smallest, for text="clip" only: in CLIP's space these are said to show what is
        asked for (CDPruner's issue 14, TRIM's issue 3, LiteLVLM, arXiv 2605.13178)
    """

    name: ClassVar[str] = "hiprune++"
    summary: ClassVar[str] = "HiPrune, and the patches most related to the prompt"
    roles: ClassVar[tuple[str, ...]] = ("anchor", "buffer", "register", "text")
    worth_trying: ClassVar[WorthTrying] = {
        **HiPrune.worth_trying,
        "beta": Values((0.0, 0.1, 0.3, 0.6)),
        "sign": Values(("direct", "negated")),
    }

    beta: float = 0.1
    text: str = "clip"
    extra: bool = False
    sign: str = "direct"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "beta", least=0, most=1)
        choice(self, "text", ("clip", "llm"))
        choice(self, "extra", (True, False))
        choice(self, "sign", ("direct", "negated"))
        if self.sign == "negated" and self.text != "clip":
            raise OptionError(
                f"hiprune++: sign='negated' is of CLIP's space, and text={self.text!r}: give "
                "text='clip', or sign='direct'"
            )

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return dataclasses.replace(super().reads(depth, feature_layer), relevance=self.text)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        relevance = context.read("relevance", self.name)
        if self.sign == "negated":
            relevance = -relevance
        text = round(self.beta * budget)
        total = budget + text if self.extra else budget
        roles = self._hierarchy(context, budget, registers_up_to=total - text)
        kept = torch.stack(tuple(roles.values())).any(0)
        missing = total - kept.sum(1, keepdim=True)
        roles["text"] = top_k(relevance, missing, among=~kept)
        return Selection.from_roles(roles)
