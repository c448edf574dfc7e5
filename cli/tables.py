"""Markdown: tables, and text in which nothing is Markdown."""

import re
from collections.abc import Iterable, Sequence

NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
TURNS_TEXT = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # marks of the direction of writing
# An underscore inside a word, as in `sample_qa`, is no Markdown. A URL would become a link.
MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def one_line(text: str) -> str:
    """Return the text as one line without control characters; marks that would turn the text show as `�`."""
    return TURNS_TEXT.sub("\ufffd", NO_TEXT.sub(" ", text))


def escape_markdown(text: str) -> str:
    """Return the text as one line in which nothing is Markdown or HTML."""
    return MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


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
