"""The chat of PyPI's llava-torch forgets its answers; GitHub's does not.

`generate` from embeddings returns only the new ids. PyPI's `serve/cli.py` cuts the prompt's length
off them all the same, so that the next turn has an empty history.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

_CUT = "output_ids[0, input_ids.shape[1]:]"


def chat_forgets() -> bool:
    """Whether the installed chat is the one that cuts."""
    spec = importlib.util.find_spec("llava.serve.cli")
    return spec is not None and spec.origin is not None and _CUT in Path(spec.origin).read_text()


def bridge_history(model: Any) -> None:
    """Let `generate` of this model return prompt and answer, if the installed chat cuts them."""
    if not chat_forgets() or hasattr(model.generate, "gives_prompt"):
        return
    stock = model.generate

    @functools.wraps(stock)
    def generate(inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        answer = stock(inputs, **kwargs)
        # transformers before 4.39 begins what it generates from embeddings with a BOS.
        begins = answer.shape[1] > 0 and bool((answer[:, 0] == model.config.bos_token_id).all())
        return torch.cat((inputs, answer[:, 1:] if begins else answer), dim=1)

    generate.gives_prompt = True  # type: ignore[attr-defined]
    model.generate = generate
