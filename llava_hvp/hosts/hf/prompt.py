"""The prompt in a conversation's token ids: the last user turn, bare.

Templates are known by what stands before a user's message and before the answer: those of the
published checkpoints, and what the tokenizer's own chat template puts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava_hvp.pruning.turns import Marks, read_pieces

KNOWN = (
    Marks("USER:", "ASSISTANT:", ("</s>",)),
    Marks("Human:", "Assistant:", ("###",)),
    Marks("[INST]", "[/INST]", ("</s>", "<s>")),
    Marks("<|im_start|>user", "<|im_start|>assistant", ("<|im_end|>",)),
    Marks(
        "<|start_header_id|>user<|end_header_id|>",
        "<|start_header_id|>assistant<|end_header_id|>",
        ("<|eot_id|>",),
    ),
)
_QUESTIONS, _ANSWER = ("question one", "question two"), "answer one"


def marks_of(tokenizer: Any, template: str | None = None) -> tuple[Marks, ...]:
    """The marks of a chat template, seen by rendering two turns; none where there is no template.

    Parameters
    ----------
    template : str | None
        instead of the tokenizer's own, as a processor has one
    """
    turns = [
        {"role": role, "content": content}
        for role, content in zip(
            ("user", "assistant", "user"), (_QUESTIONS[0], _ANSWER, _QUESTIONS[1]), strict=True
        )
    ]
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        return ()
    for parts in (False, True):  # templates of processors want a message in parts
        shaped = [_in_parts(turn) for turn in turns] if parts else turns
        try:
            text = tokenizer.apply_chat_template(
                shaped, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template that wants the other shape, or raises on ours
            continue
        if all(text.count(said) == 1 for said in (*_QUESTIONS, _ANSWER)):
            return _between(text)
    return ()


def _in_parts(turn: dict[str, str]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _between(text: str) -> tuple[Marks, ...]:
    """The marks that a rendered conversation shows."""
    first, rest = text.split(_QUESTIONS[0])
    answer, rest = rest.split(_ANSWER)
    again, last = rest.split(_QUESTIONS[1])
    # What ends an answer stands before the next user's mark, and may stand before the first too.
    same = 0
    while same < min(len(first), len(again)) and first[-1 - same] == again[-1 - same]:
        same += 1
    user = again[len(again) - same :].strip() or again.strip()
    answer = last.strip() if answer.strip().endswith(last.strip()) else answer.strip()
    return (Marks(user, answer),) if user and answer else ()


def read_prompt(ids: Tensor, tokenizer: Any, image_token: int, marks: Sequence[Marks]) -> str:
    """The last user turn of one row of `input_ids`, (tokens,) with padding taken off.

    Raises TextEncoderError where there is no text in it.
    """
    pieces: list[list[int]] = [[]]
    for token in ids.tolist():
        if token != image_token:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return read_pieces(pieces, tokenizer, marks)
