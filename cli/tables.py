"""Markdown: tables, and text in which nothing is Markdown."""

import re
from collections.abc import Iterable, Sequence

NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
MARKDOWN = re.compile(r"[\\`*\[\]<>|&]")


def escape_markdown(text: str) -> str:
    """Return the text as one line in which nothing is Markdown or HTML."""
    return MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", NO_TEXT.sub(" ", text))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: Sequence[str] | None = None) -> str:
    """Return a Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells of each row, one per column.
        align: One of `---` (left) and `--:` (right) per column. Default: the first column left, the others right.
    """
    align = align or ["---"] + ["--:"] * (len(header) - 1)
    lines = [header, align, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
