"""Rows of .jsonl, .json, .parquet, .csv and .txt files, plain or .gz, each with its place or with what is wrong.

for row in read_rows(path):            # row.content is a dict of all columns
for row in read_rows(path, ["text"]):  # row.content is the text in the first of these columns
"""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from buddygpt.launch import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
csv.field_size_limit(sys.maxsize)  # the default refuses documents above 128 kB


class Row(NamedTuple):
    """One row of an input file, or what is wrong with it."""

    number: int  # the line, or the row where a file has no lines, from 1
    content: Any  # a dict of its columns, or the text that was asked for
    error: str = ""


def find_files(patterns: list[str]) -> list[Path]:
    """Return the files that names and globs stand for, each once, sorted within a pattern.

    Raises:
        UserError: A pattern that no file matches.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not found:
            raise UserError(f"no file matches `{pattern}`")
        files.update(dict.fromkeys(found))
    return list(files)


def progress_bar(files: list[Path], **options: Any) -> tqdm:
    """Return a bar over the bytes of the files, for [`read_rows`] to move."""
    return tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, **options)


def read_rows(
    path: Path, text_key: list[str] | None = None, bar: tqdm | None = None, txt_sample_by: str = "document"
) -> Iterator[Row]:
    """Yield every row of a file, bad ones too, holding one row in memory (parquet: a batch, a JSON array: all of it).

    Args:
        path: A .jsonl or .json (lines, or an array), .parquet or .csv file. With a `text_key`, also .txt.
        text_key: The first of these columns that a row has is its text, and text is all that is read.
        bar: A [`progress_bar`].
        txt_sample_by: Whether a .txt file is one `document` or has one document a `line`.

    Raises:
        UserError: The file is of another type, has no such column, or cannot be read on.
    """
    readers = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    if text_key:
        readers[".txt"] = {"document": _read_document, "line": _read_lines}[txt_sample_by]
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise UserError(f"{path}: unknown type `{suffix}`; use one of {', '.join(readers)}")
    bar = tqdm(disable=True) if bar is None else bar
    start, number = bar.n, 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            if stream.peek(3)[:3] == codecs.BOM_UTF8:
                stream.read(3)
            for row in readers[suffix](stream, text_key):
                number = row.number
                bar.update(start + raw.tell() - bar.n)
                yield _check(row, text_key)
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path}{f':{number}' if number else ''}: cannot be read: {error}") from error


def _read_json(stream: BinaryIO, text_key: list[str] | None) -> Iterator[Row]:
    if not stream.peek(1).lstrip().startswith(b"["):
        for number, line in enumerate(stream, start=1):
            yield _parse(number, line.rstrip()) if line.strip() else Row(number, {})
        return
    array = _parse(1, stream.read())
    if array.error:
        raise ValueError(f"line {array.number}: {array.error}")
    for number, content in enumerate(array.content, start=1):
        yield Row(number, content)


def _read_parquet(stream: BinaryIO, text_key: list[str] | None) -> Iterator[Row]:
    with pq.ParquetFile(stream) as file:
        columns = _find_columns(file.schema_arrow.names, text_key)
        batches = file.iter_batches(batch_size=256, columns=columns)
        rows = (row for batch in batches for row in batch.to_struct_array())
        for number, row in enumerate(rows, start=1):
            try:
                yield Row(number, _without_none(row.as_py()))
            except UnicodeDecodeError:
                yield Row(number, None, "not valid UTF-8")


def _read_csv(stream: BinaryIO, text_key: list[str] | None) -> Iterator[Row]:
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline=""), strict=True)
    columns = _find_columns(rows.fieldnames or [], text_key)
    for row in rows:
        missing = [column for column in columns if row[column] is None]
        if missing or None in row:
            error = f"the row ends before column `{missing[0]}`" if missing else "the row is longer than the header"
            yield Row(rows.line_num, None, error)
            continue
        text = "".join(row[column] for column in columns)
        number, escaped = rows.line_num - text.count("\n"), LONE_SURROGATE.search(text)
        if escaped:
            yield Row(number + text.count("\n", 0, escaped.start()), None, "not valid UTF-8")
        else:
            yield Row(number, row)


def _read_lines(stream: Iterable[bytes], text_key: list[str]) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        row = _decode(number, line)
        yield row._replace(content={text_key[0]: row.content})


def _read_document(stream: BinaryIO, text_key: list[str]) -> Iterator[Row]:
    return _read_lines([stream.read()], text_key)


def _decode(number: int, data: bytes) -> Row:
    try:
        return Row(number, data.decode())
    except UnicodeDecodeError as error:
        return Row(number + data.count(b"\n", 0, error.start), None, f"not valid UTF-8 ({error.reason})")


def _parse(number: int, data: bytes) -> Row:
    row = _decode(number, data)
    try:
        return row if row.error else Row(number, json.loads(row.content))
    except json.JSONDecodeError as error:
        return Row(number + error.lineno - 1, None, f"not valid JSON: {error.msg}, column {error.colno}")


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _find_columns(names: list[str], text_key: list[str] | None) -> list[str]:
    """Return all names, or the first of `text_key` that is among them."""
    if text_key is None:
        return names
    found = [key for key in text_key if key in names]
    if not found:
        raise ValueError(f"no column `{'` or `'.join(text_key)}`; there are: {', '.join(names)}")
    return found[:1]


def _check(row: Row, text_key: list[str] | None) -> Row:
    """Return the row if it is an object, or its text where that is asked for; else a row with the error."""
    if row.error:
        return row
    if not isinstance(row.content, dict):
        return Row(row.number, None, f"the row is no object but {type(row.content).__name__}")
    if text_key is None:
        return row
    if not row.content:  # a blank line, or an empty cell of a parquet file
        return Row(row.number, "")
    try:
        (column,) = _find_columns(list(row.content), text_key)
    except ValueError as error:
        return Row(row.number, None, str(error))
    text = "" if row.content[column] is None else row.content[column]
    if not isinstance(text, str):
        return Row(row.number, None, f"column `{column}` holds {type(text).__name__}, not text")
    if LONE_SURROGATE.search(text):
        return Row(row.number, None, f"column `{column}` holds half a surrogate pair")
    return Row(row.number, text)
