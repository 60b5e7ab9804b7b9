"""MMTok: patches that cover the prompt's words and the picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_hvp.errors import ContextError
from llava_hvp.lazy import torch
from llava_hvp.methods.base import Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.checks import number
from llava_hvp.methods.greedy import cosines, covering, mask_of, unit
from llava_hvp.methods.worth import Values, WorthTrying

if TYPE_CHECKING:
    from torch import Tensor

# Facts of the official rule: what is cut from a prompt, and the words that count for nothing.
INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_STOP_WORDS = """
a an and answer are at be been being but by did do does for from had has have he how i if into is
it onto or question she so the then they to upon was we were what when where which who why with you
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, kw_only=True)
class MMTok(VisionMethod):
    """MMTok (arXiv 2508.18264, ICLR 2026): maximum coverage of text and vision.

    Rows to cover are the prompt's words, by the softmax over the patches of the cosine of word
    and projected patch, and the patches, by that of their features before the projector. Always
    the patch that adds most is taken. Exactly the budget is kept.

    Official code: github.com/Ironieser/MMTok@d1522cd (Apache-2.0). Departures: any conversation
    template (there vicuna_v1), any batch, and where fewer patches than the budget lie outside a
    squared picture's padding, patches of the padding fill it (there the first patch again).

    Parameters
    ----------
    alpha : float
        weight of the patches against the words, at least 0
    t_text : float
        temperature of the softmax over patches for a word
    t_vision : float
        and for a patch
    """

    name: ClassVar[str] = "mmtok"
    summary: ClassVar[str] = "patches that cover the prompt's words and the other patches"
    roles: ClassVar[tuple[str, ...]] = ("covering",)
    worth_trying: ClassVar[WorthTrying] = {
        "alpha": Values((0.25, 0.5, 1.0, 2.0)),
        "t_vision": Values((0.05, 0.1, 0.2, 0.5)),
    }

    alpha: float = 0.5
    t_text: float = 0.02
    t_vision: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "alpha", least=0, most=100)
        number(self, "t_text", above=0, most=100)
        number(self, "t_vision", above=0, most=100)

    def reads(self, depth: int | None, feature_layer: int | None) -> Needs:
        return Needs(features=True, projected=True, words=True, padding=True)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        features = context.read("features", self.name)
        vision = (cosines(features) / self.t_vision).softmax(-1) / context.patches
        rows = torch.cat([self.alpha * vision, self._text(context)], dim=1)
        order = covering(rows, budget, last=context.padding)
        return Selection.from_roles({"covering": mask_of(order, context.patches)})

    def _text(self, context: VisionContext) -> Tensor:
        """(T, M, N): how well each patch covers each word of its image's prompt.

        M is that of the longest prompt; rows that a shorter one lacks are 0, and add nothing.
        """
        counts = [len(words) for words in context.words or ()]
        if not counts or 0 in counts:
            raise ContextError(
                f"mmtok needs the prompt's words, at least one an image: the context has "
                f"{counts or 'none'}"
            )
        images = context.images
        of_tile = [image for image, tiles in enumerate(images) for _ in range(tiles)]
        index = torch.tensor(of_tile, device=context.device)
        share = torch.nn.utils.rnn.pad_sequence(
            [torch.full((count, 1), 1 / count, device=context.device) for count in counts],
            batch_first=True,
        )
        words = torch.nn.utils.rnn.pad_sequence(
            [unit(w) for w in context.words or ()], batch_first=True
        )
        patches = unit(context.read("projected", self.name)).transpose(1, 2)
        return (words[index] @ patches / self.t_text).softmax(-1) * share[index]


def content_words(prompt: str) -> str:
    """The words of a prompt that MMTok covers, in their order, with a blank between them.

    Without the benchmarks' instructions, punctuation and the stop words; the prompt less the
    instructions where nothing else is left.
    """
    for instruction in INSTRUCTIONS:
        prompt = prompt.replace(instruction, "")
    words = [word for word in re.findall(r"\w+", prompt) if word.lower() not in STOP_WORDS]
    return " ".join(words) or prompt
