"""The last user turn of a conversation, bare: between the marks that its template sets."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_hvp.errors import TextEncoderError


@dataclass(frozen=True)
class Marks:
    """What stands around a user's message.

    Parameters
    ----------
    user, answer : str
        before the message, and between it and the answer
    ends : tuple[str, ...]
        what may end a message
    """

    user: str
    answer: str
    ends: tuple[str, ...] = ()


def last_user_turn(text: str, marks: Iterable[Marks], drop: Sequence[str] = ()) -> str:
    """The last user message of a conversation, without system text and role names.

    Text in no template is one message.

    Parameters
    ----------
    drop : Sequence[str]
        what is no text of the message, as the tokens of images
    """
    best = (-1, text)
    for known in marks:
        answers = [match.start() for match in _pattern(known.answer).finditer(text)]
        if not answers or answers[-1] <= best[0]:
            continue
        # A turn starts at the first user mark after the answer before it; a message that quotes
        # the answer's mark has none there, so look one answer further back.
        for before in [*reversed(answers[:-1]), 0]:
            start = _pattern(known.user).search(text, before, answers[-1])
            if start is not None:
                message = text[start.end() : answers[-1]].strip()
                for end in known.ends:
                    message = message.removesuffix(end).strip()
                best = (answers[-1], message)
                break
    message = re.sub(r"<<SYS>>.*?<</SYS>>", "", best[1], flags=re.DOTALL)
    for word in drop:
        message = message.replace(word, " ")
    return message.strip()


@functools.cache
def _pattern(mark: str) -> re.Pattern[str]:
    # Slow tokenizers decode special tokens with a space after them: "<|im_start|> user".
    return re.compile(re.escape(mark).replace(">", r">\s*"))


def read_pieces(
    pieces: Iterable[list[int]], tokenizer: Any, marks: Iterable[Marks], drop: Sequence[str] = ()
) -> str:
    """The last user turn of a row's token ids, given in the pieces that its images leave.

    Raises TextEncoderError where there is no text in it.
    """
    text = " ".join(
        tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for piece in pieces
    )
    prompt = last_user_turn(text, marks, drop)
    for special in tokenizer.all_special_tokens:
        prompt = prompt.replace(special, " ").strip()
    if not prompt:
        raise TextEncoderError(
            "the conversation's last user turn has no text, and this method keeps what the prompt "
            "asks about: ask something, or use one that does not read it, as hiprune"
        )
    return prompt
