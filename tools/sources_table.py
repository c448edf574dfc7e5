"""Update the table of public data sets in data/README.md from data/sources.yaml.

python tools/sources_table.py
"""

import re
from pathlib import Path

from buddygpt.cli.errors import run_script
from buddygpt.cli.files import write_atomically
from buddygpt.cli.tables import markdown_table
from buddygpt.data.text.sources import Reader, load_readers

README = Path(__file__).parents[1] / "data" / "README.md"
HEADER = ["`reader`", "data set", "what it is", "language", "size", "license", "entry"]
MARKED = re.compile(r"(<!-- sources: generated [^\n]*-->\n).*(<!-- sources: end -->)", re.DOTALL)


def table_row(reader: Reader) -> list[str]:
    languages = ", ".join(reader.files) or "any"
    place = reader.hub or reader.title
    return [f"`{reader.name}`", place, reader.about, languages, reader.size, reader.license, f"`{reader.example}`"]


def replace_table(readme: str) -> str:
    """Return the text of the README with the table that data/sources.yaml gives between the two marks."""
    rows = [table_row(reader) for reader in load_readers().values()]
    table = markdown_table(HEADER, rows, align=["---"] * len(HEADER))
    return MARKED.sub(lambda match: f"{match[1]}{table}\n{match[2]}", readme)


def main() -> None:
    readme = replace_table(README.read_text(encoding="utf-8"))
    with write_atomically(README) as partial:
        partial.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
