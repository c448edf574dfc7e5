"""A report as blocks of plain text, written as Markdown and as one HTML file.

What models say may hold HTML, Markdown, control characters and marks that turn the direction of text. Blocks hold such
text as it is; only the two writers below escape it. The HTML file holds its pictures, loads nothing and runs no code.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import require_output
from buddygpt.cli.tables import escape_markdown, markdown_table, one_line

TEMPLATE = "report.html.jinja"
NUMBERS = re.compile(r"(?!.*\]\()[A-Za-z0-9+\-.,% \[\]()]*")  # `25.1% [20.8, 29.8] (chance)`, but no `[link](URL)`


@dataclass
class Heading:
    english: str
    chinese: str = ""
    level: int = 2

    @property
    def text(self) -> str:
        return f"{self.english} / {self.chinese}" if self.chinese else self.english


@dataclass
class Text:
    """A paragraph."""

    text: str
    warning: bool = False


@dataclass
class Table:
    """A table; `align` as in [`markdown_table`]."""

    header: list[str]
    rows: list[list[str]]
    align: list[str] | None = None

    def is_right(self, column: int) -> bool:
        return self.align[column] == "--:" if self.align else column > 0


@dataclass
class Picture:
    """A picture in the folder of the report."""

    alt: str
    name: str


@dataclass
class Folded:
    """Blocks under a title that opens them."""

    title: str
    blocks: list[Heading | Text | Table | Picture]


Block = Heading | Text | Table | Picture | Folded


def require_markdown(output: Path) -> None:
    """Raise UserError if `output` cannot be written, or is no .md: it could be one of the files written beside it."""
    require_output(output, "file")
    if output.suffix != ".md":
        raise UserError(f"output: {output} is no Markdown file; give FILE.md")


def to_markdown(blocks: list[Block]) -> str:
    """Return the report as Markdown."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {escape_markdown(block.text)}"
        case Text():
            return ("**!** " if block.warning else "") + escape_markdown(block.text)
        case Table():
            rows = [[cell if NUMBERS.fullmatch(cell) else escape_markdown(cell) for cell in row] for row in block.rows]
            return markdown_table([escape_markdown(title) for title in block.header], rows, block.align)
        case Picture():
            return f"![{escape_markdown(block.alt)}]({block.name})"
        case Folded():
            title = f"<summary>{escape_markdown(block.title)}</summary>"
            return f"<details>{title}\n\n{to_markdown(block.blocks)}\n</details>"


def to_html(title: str, blocks: list[Block], folder: Path) -> str:
    """Return the report as one HTML file with the pictures of `folder` inside."""

    def picture(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )
    environment.filters["picture"] = picture
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template(TEMPLATE).render(title=title, blocks=blocks)
