"""Markdown tables."""

from collections.abc import Iterable, Sequence


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
