"""Read the documents of a source: the first step of data preparation.

Most data sets have their text in columns that data/sources.yaml names. The functions below are for the others: a
function gets a row, a dict of its columns, and returns its text and metadata. Add a new one to `ROW_FUNCTIONS`.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter
from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.data.text.counts import RowCounts
from buddygpt.data.text.rows import Row, is_url, progress_bar, read_rows, text_error
from buddygpt.data.text.sources import Reader, Source, load_readers

Text = tuple[str, dict[str, Any]]  # the text of a document, and its metadata
STARCODER_HEADER = re.compile(r"(?:(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?)?")
STARCODER_COLUMNS = {"repo": "max_stars_repo_name", "path": "max_stars_repo_path"}
UPVOTES = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*([千万kKwW]?)")
THOUSANDS = {"": 1, "千": 1_000, "k": 1_000, "万": 10_000, "w": 10_000}


class SourceReader(PipelineStep):
    """Yields the documents of a source. (The readers of datatrove log bad rows and continue without them.)

    Args:
        assignments: For each rank, a source and the files of it to read.
        on_bad_row: `stop` raises [`UserError`] at a row that cannot be read; `skip` prints and counts it.
        exclusion_writer: Gets the documents below a threshold of their source, and the errors of bad rows.
    """

    type, name = "READER", "sources"

    def __init__(
        self,
        assignments: list[tuple[Source, tuple[str, ...]]],
        on_bad_row: str,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__()
        self.assignments, self.on_bad_row, self.exclusion_writer = assignments, on_bad_row, exclusion_writer
        self.counts = RowCounts()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, files = self.assignments[rank]
        reader = load_readers()[source.reader]
        exclusions = self.exclusion_writer or contextlib.nullcontext()
        with progress_bar(files, desc=f"{source.name} {rank + 1}/{world_size}", leave=False) as bar, exclusions:
            for file in files:
                for row in _rows(source, reader, file, bar):
                    self.counts.add("read")
                    try:
                        document = _make_document(source, reader, file, row)
                        rule = _below_minimum(source, document)
                    except ValueError as error:
                        document, rule = self._bad_row(f"{file}:{row.number}", error), "bad_row"
                    if rule:
                        self._drop(document, rule, rank)
                    else:
                        yield document

    def _bad_row(self, place: str, error: ValueError) -> Document:
        """Raise UserError, or return a document that holds the error instead of the row."""
        if self.on_bad_row == "stop":
            raise UserError(f"{place}: {error}. Fix it, or set `on_bad_row: skip`.")
        tqdm.write(f"skipped {place}: {error}", file=sys.stderr)
        return Document(str(error), id=place)

    def _drop(self, document: Document, rule: str, rank: int) -> None:
        self.counts.add("dropped", rule)
        if self.exclusion_writer:
            document.metadata["filter_reason"] = rule
            self.exclusion_writer.write(document, rank)


def _rows(source: Source, reader: Reader, file: str, bar: tqdm) -> Iterator[Row]:
    """Return the rows of a file: all columns if `_make_document` joins or converts them, else only the text."""
    path = file if is_url(file) else Path(file)
    if reader.join or reader.function:
        return read_rows(path, bar=bar)
    keep = tuple(dict.fromkeys((*reader.keep, *source.minimums)))
    separator = re.compile(source.txt_separator) if source.txt_separator else None
    return read_rows(path, source.text_key, bar, source.txt_sample_by, keep, separator)


def _make_document(source: Source, reader: Reader, file: str, row: Row) -> Document:
    """Return the document of a row. Raises ValueError if the row does not have the form of its data set."""
    if row.error:
        raise ValueError(row.error)
    if not (reader.join or reader.function):
        text, metadata = row.content, _numbers(row.kept)
    elif not row.content:  # a blank line
        text, metadata = "", {}
    else:
        try:
            if reader.join:
                text, metadata = join_columns(row.content, reader), {}
            else:
                text, metadata = ROW_FUNCTIONS[reader.function](row.content)
        except KeyError as error:
            raise ValueError(f"no column `{error.args[0]}`; there are: {', '.join(row.content)}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a row of `{source.reader}`: {error}") from error
        if error := text_error(text):
            raise ValueError(f"the text {error}")
    return Document(text, id=f"{file}:{row.number}", metadata={"source": source.name} | metadata)


def _numbers(columns: dict[str, Any]) -> dict[str, float]:
    """Return the columns that are numbers, or strings of numbers as in some data sets."""
    numbers = {}
    for key, value in columns.items():
        with contextlib.suppress(ValueError, TypeError):
            numbers[key] = float(value) if isinstance(value, str) else value + 0
    return numbers


def _below_minimum(source: Source, document: Document) -> str:
    """Return the rule that drops the document, `low_...`, or an empty string if it passes every threshold."""
    for key, least in source.minimums.items():
        if document.text and key not in document.metadata:
            raise ValueError(f"`{key}` has a minimum but is not a number here")
        if not document.metadata.get(key, least) >= least:  # not `<`, because NaN is dropped too
            return f"low_{key}"
    return ""


def join_columns(row: dict[str, Any], reader: Reader) -> str:
    """Join the columns that data/sources.yaml names. KeyError if one that is not optional is missing."""
    return paragraphs(*(row.get(key) if key in reader.optional else row[key] for key in reader.join))


def paragraphs(*parts: str | None) -> str:
    """Join the parts that are not blank, with a blank line between them."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def baidubaike(row: dict[str, Any]) -> Text:
    """Title, summary, then title and content of each section."""
    parts = [row["title"], row.get("summary")]
    for section in row.get("sections") or ():
        parts += [section["title"], section["content"]]
    return paragraphs(*parts), {}


def baike_qa(row: dict[str, Any]) -> Text:
    """Question, its description, answer. The description is often empty, or repeats the title."""
    description = row.get("desc")
    if description == row["title"]:
        description = None
    return paragraphs(row["title"], description, row["answer"]), {}


def zhihu_kol(row: dict[str, Any]) -> Text:
    """Question and answer, with the upvotes as metadata."""
    metadata = row["METADATA"]
    if not isinstance(metadata, dict):
        metadata = json.loads(metadata)
    return paragraphs(row["INSTRUCTION"], row["RESPONSE"]), {"upvotes": parse_upvotes(metadata["upvotes"])}


def parse_upvotes(label: str) -> int:
    """Read the label of Zhihu's button: `赞同 15`, `赞同 1.2 万`; `赞同` alone is 0."""
    found = UPVOTES.search(label)
    if not found:
        return 0
    number, unit = found.groups()
    return round(float(number.replace(",", "")) * THOUSANDS[unit.lower()])


def wanjuan(row: dict[str, Any]) -> Text:
    """`content`; for exam questions: question, options, answer and explanation."""
    if "q_main" not in row:
        return row["content"], {}
    lines = [row["q_main"].strip()]
    for letter in "abcde":
        option = row.get(f"option_{letter}")
        if option:
            lines.append(f"{letter.upper()}. {option}")
    parts = ["\n".join(lines)]
    if answer := row.get("std_ans") or row.get("answer"):
        parts.append(f"答案：{answer}")
    if explanation := row.get("answer_detail"):
        parts.append(f"解析：{explanation}")
    return paragraphs(*parts), {}


def dialogue(row: dict[str, Any]) -> Text:
    """All turns of a dialogue: {role, content}, {from, value}, or {human, assistant} for two turns."""
    turns = row.get("messages") or row.get("conversations") or row["conversation"]
    keys = ("content", "value", "human", "assistant")
    return paragraphs(*(turn[key] for turn in turns for key in keys if turn.get(key))), {}


def starcoderdata(row: dict[str, Any]) -> Text:
    """The code, without the line of special tokens (`<reponame>...`) that some files begin with."""
    header = STARCODER_HEADER.match(row["content"])
    metadata = {"stars": row.get("max_stars_count") or 0}  # null if the repository has no stars
    for key, column in STARCODER_COLUMNS.items():
        if row.get(column):
            metadata[key] = row[column]
    return row["content"][header.end() :], metadata


ROW_FUNCTIONS: dict[str, Callable[[dict[str, Any]], Text]] = {
    function.__name__: function for function in (baidubaike, baike_qa, zhihu_kol, wanjuan, dialogue, starcoderdata)
}
