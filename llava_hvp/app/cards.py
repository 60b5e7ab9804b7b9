"""Answers as cards of HTML, a grid of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from llava_hvp.app.comparing import Answer

CSS = """
.hvp-cards { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.hvp-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px; }
.hvp-card h3 { margin: 0 0 4px; font-size: 1rem; overflow-wrap: anywhere; }
.hvp-card .said { font-size: 1.25rem; font-weight: 600; margin: 4px 0; overflow-wrap: anywhere; }
.hvp-card .facts { font-size: .9rem; margin: 4px 0 8px; }
.hvp-card img { width: 100%; height: auto; border-radius: 4px; }
.hvp-error { border: 1px solid #b3261e; border-radius: 8px; padding: 12px; }
.hvp-error::before { content: "Not answered: "; font-weight: 600; }
"""


def cards(found: Sequence[Answer], waiting: int = 0) -> str:
    """The grid; a line says how many are still to come."""
    unpruned = found[0] if found else None
    drawn = "".join(_card(answer, unpruned) for answer in found)
    more = f'<p role="status">{waiting} more to come …</p>' if waiting else ""
    return f'<div class="hvp-cards">{drawn}</div>{more}'


def failed(message: str) -> str:
    """What is wrong, in one line."""
    return f'<p class="hvp-error" role="alert">{escape(message)}</p>'


def _card(answer: Answer, unpruned: Answer | None) -> str:
    heading = f'<div class="hvp-card"><h3>{escape(answer.label)}</h3>'
    if answer.error:
        return f"{heading}{failed(answer.error)}</div>"
    share = answer.tokens / answer.stock_tokens
    facts = f"{answer.tokens:.0f} of {answer.stock_tokens} visual tokens ({share:.0%}), "
    facts += f"{answer.seconds:.2f} s"
    if unpruned is not None and answer is not unpruned:
        same = answer.said == unpruned.said
        facts += f" ({answer.seconds / unpruned.seconds:.2f} x unpruned), "
        facts += "the same answer" if same else "another answer"
    said = escape(answer.said) or "(nothing)"
    body = f'<p class="said">{said}</p><p class="facts">{escape(facts)}</p>'
    return f"{heading}{body}{_image(answer.drawn, answer.label)}</div>"


def _image(drawn: Any, label: str) -> str:
    if drawn is None:
        return ""
    file = io.BytesIO()
    drawn.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    kept = escape(f"What {label} keeps of the picture", quote=True)
    return f'<img alt="{kept}" src="data:image/png;base64,{data}">'
