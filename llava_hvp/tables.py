"""Tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TERMINAL, MARKDOWN = "simple", "github"
AIR = 2  # spaces that a column has beside its heading


def text_table(rows: Sequence[Mapping[str, str]], style: str) -> str:
    """The rows, left-aligned, under the keys of the first one; "" where there are none.

    Parameters
    ----------
    style : str
        TERMINAL or MARKDOWN
    """
    names = list(rows[0]) if rows else []
    return aligned(names, [[row[name] for name in names] for row in rows], style)


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    """The cells, left-aligned, under headings of which some may be the same; "" without rows."""
    if not rows:
        return ""
    lines = [headings, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    widths = [max(n, len(name) + AIR) for n, name in zip(widths, headings, strict=True)]
    padded = [[cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    if style == MARKDOWN:
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        drawn = [f"| {' | '.join(cells)} |" for cells in padded]
    else:
        rule = "  ".join("-" * width for width in widths)
        drawn = ["  ".join(cells).rstrip() for cells in padded]
    return "\n".join([drawn[0], rule, *drawn[1:]])
