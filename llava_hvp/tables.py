"""Tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TERMINAL, MARKDOWN = "simple", "github"
AIR = 2  # spaces that a column has beside its heading


def text_table(rows: Sequence[Mapping[str, str]], style: str) -> str:
    """The rows, left-aligned, under the keys of the first one; "" where there are none.

    style : TERMINAL or MARKDOWN
    """
    if not rows:
        return ""
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [
        max(len(names[at]) + AIR, *(len(line[at]) for line in lines)) for at in range(len(names))
    ]
    padded = [[cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    if style == MARKDOWN:
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        drawn = [f"| {' | '.join(cells)} |" for cells in padded]
    else:
        rule = "  ".join("-" * width for width in widths)
        drawn = ["  ".join(cells).rstrip() for cells in padded]
    return "\n".join([drawn[0], rule, *drawn[1:]])
