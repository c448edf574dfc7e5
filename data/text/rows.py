"""Rows of .jsonl, .json, .parquet, .csv and .txt files, plain, .gz or .zst, each with its place or what is wrong.

for row in read_rows(path):            # row.content is a dict of all columns
for row in read_rows(path, ["text"]):  # row.content is the text in the first of these columns

A path on this machine, or a URL that fsspec opens (hf://, s3://, memory://, ...): that is read as a stream.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_type

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\n\r]*")
HAN = re.compile("[\u4e00-\u9fff]")
CHUNK = 2**16  # bytes of a JSON array that are read at once
LONGEST_TOKEN = 16  # characters of JSON that mean nothing until they are whole: `\\ud83d\\ude00`, `-Infinity`
PARQUET_BUFFER = 2**20  # bytes; without one pyarrow reads a column of a whole row group at once
csv.field_size_limit(sys.maxsize)  # the default refuses documents above 128 kB


class Row(NamedTuple):
    """One row of an input file, or what is wrong with it."""

    number: int  # the line, or the row where a file has no lines, from 1
    content: Any  # a dict of its columns, or the text that was asked for
    error: str = ""
    kept: dict[str, Any] = {}  # the other columns that were asked for, beside the text


def is_url(file: Path | str) -> bool:
    return isinstance(file, str) and "://" in file


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn whatever a remote file system raises, each has errors of its own, into a [`UserError`]."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{url}: cannot be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def file_size(file: Path | str) -> int:
    """Return the bytes that a file or URL holds."""
    if not is_url(file):
        return Path(file).stat().st_size
    with remote_errors(file):
        system, name = fsspec.url_to_fs(file)
        return system.size(name)


def progress_bar(files: Sequence[Path | str], **options: Any) -> tqdm:
    """Return a bar over the bytes of the files, for [`read_rows`] to move."""
    return tqdm(total=sum(map(file_size, files)), unit="B", unit_scale=True, **options)


def read_rows(
    path: Path | str,
    text_key: Sequence[str] | None = None,
    bar: tqdm | None = None,
    txt_sample_by: str = "document",
    keep: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield every row of a file, bad ones too, holding one row in memory (parquet: a batch).

    Args:
        path: A .jsonl or .json (lines, or an array), .parquet or .csv file or URL. With a `text_key`, also .txt.
        text_key: The first of these columns that a row has is its text, and text is all that is read.
        bar: A [`progress_bar`].
        txt_sample_by: Whether a .txt file is one `document` or has one document a `line`.
        keep: Other columns to read with the text, where a file has them.

    Raises:
        UserError: The file is of another type, has no such column, or cannot be read on.
    """
    readers = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    if text_key:
        readers[".txt"] = {"document": _read_document, "line": _read_lines}[txt_sample_by]
    suffix = file_type(path)
    if suffix not in readers:
        raise UserError(f"{path}: unknown type `{suffix}`; use one of {', '.join(readers)}")
    bar = tqdm(disable=True) if bar is None else bar
    start, number = bar.n, 0
    try:
        opened = fsspec.open(path) if is_url(path) else open(path, "rb")  # noqa: SIM115
        with opened as raw, _decompress(raw, PurePosixPath(path).suffix) as stream:
            _skip_byte_order_mark(stream)
            for row in readers[suffix](stream, text_key, keep):
                number = row.number
                bar.update(start + raw.tell() - bar.n)
                yield _check(row, text_key, keep)
    except Exception as error:
        known = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, csv.Error)
        if not isinstance(error, known) and not is_url(path):  # remote file systems have errors of their own
            raise
        raise UserError(f"{path}{f':{number}' if number else ''}: cannot be read: {one_line(error)}") from error


def _decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":  # Python's own zstandard takes a truncated file for a whole one
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


def _skip_byte_order_mark(stream: BinaryIO) -> None:
    start = stream.peek(3)[:3]
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError("it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
    if start == codecs.BOM_UTF8:
        stream.read(3)


def _read_json(stream: BinaryIO, text_key: Sequence[str] | None, keep: Sequence[str]) -> Iterator[Row]:
    if stream.peek(1).lstrip().startswith(b"["):
        yield from _read_array(stream)
        return
    for number, line in enumerate(stream, start=1):
        yield _parse(number, line.rstrip()) if line.strip() else Row(number, {})


def _read_array(stream: BinaryIO) -> Iterator[Row]:
    """Parse one element after another, holding one and a chunk. (ijson takes minutes for a string of 50 MB.)"""
    scan, decode = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, number = decode(stream.read(CHUNK)), 1
    start = text.index("[") + 1
    while True:
        start = SPACE.match(text, start).end()
        if number == 1 and text[start : start + 1] == "]":
            start += 1
            break
        try:
            content, end = scan(text, start)
            end = SPACE.match(text, end).end()
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except (ValueError, RecursionError) as error:
            # What is near the end may go on: an element is parsed anew whenever as much again has been read.
            place = len(text) if str(error).startswith("Unterminated") else getattr(error, "pos", 0)
            more = stream.read(max(CHUNK, len(text) - start)) if place >= len(text) - LONGEST_TOKEN else b""
            if not more:
                reason = _encoding_error(text) or f"not valid JSON: {getattr(error, 'msg', error)}"
                raise ValueError(f"row {number}: {reason}") from error
            text, start = text[start:] + decode(more), 0
            continue
        error = _encoding_error(text[start:end])
        yield Row(number, None if error else content, error)
        start, number = end + 1, number + 1
        if text[end] == "]":
            break
    if SPACE.sub("", text[start:] + decode(stream.read(CHUNK))):
        raise ValueError("there is more after the end of the array")


def _encoding_error(text: str) -> str:
    """Say what is wrong with text that was decoded with errors="surrogateescape"; nothing if it was UTF-8."""
    try:
        text.encode()
        return ""
    except UnicodeEncodeError:
        return not_utf8(text.encode(errors="surrogateescape"))


def _read_parquet(stream: BinaryIO, text_key: Sequence[str] | None, keep: Sequence[str]) -> Iterator[Row]:
    local = isinstance(getattr(stream, "raw", None), io.FileIO)  # elsewhere, each column would fetch the others' bytes
    with pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER if local else 0) as file:
        columns = _find_columns(file.schema_arrow.names, text_key, keep)
        batches = file.iter_batches(batch_size=256, columns=columns)
        rows = (row for batch in batches for row in batch.to_struct_array())
        for number, row in enumerate(rows, start=1):
            try:
                yield Row(number, _without_none(row.as_py()))
            except UnicodeDecodeError as error:
                yield Row(number, None, not_utf8(error.object))


def _read_csv(stream: BinaryIO, text_key: Sequence[str] | None, keep: Sequence[str]) -> Iterator[Row]:
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline=""), strict=True)
    columns = _find_columns(rows.fieldnames or [], text_key, keep)
    for row in rows:
        missing = [column for column in columns if row[column] is None]
        if missing or None in row:
            error = f"the row ends before column `{missing[0]}`" if missing else "the row is longer than the header"
            yield Row(rows.line_num, None, error)
            continue
        text = "".join(row[column] for column in columns)
        number, escaped = rows.line_num - text.count("\n"), LONE_SURROGATE.search(text)
        if escaped:
            line = number + text.count("\n", 0, escaped.start())
            yield Row(line, None, not_utf8(text.encode(errors="surrogateescape")))
        else:
            yield Row(number, row)


def _read_lines(stream: Iterable[bytes], text_key: Sequence[str], keep: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        row = _decode(number, line)
        yield row if row.error else row._replace(content={text_key[0]: row.content})


def _read_document(stream: BinaryIO, text_key: Sequence[str], keep: Sequence[str]) -> Iterator[Row]:
    return _read_lines([stream.read()], text_key, keep)


def not_utf8(data: bytes) -> str:
    """Say that bytes are no UTF-8, and that they look like GB18030 if they do (and not like damaged UTF-8)."""
    damaged = data.decode(errors="replace")
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data)  # lets a character at the end be cut
    except UnicodeDecodeError:
        text = ""
    is_text = re.search(f"{HAN.pattern}{{2}}", text) and damaged.count("\ufffd") > len(HAN.findall(damaged))
    hint = "; it looks like GB18030: convert it with `iconv -f GB18030 -t UTF-8`" if is_text else ""
    return f"not valid UTF-8{hint}"


def _decode(number: int, data: bytes) -> Row:
    try:
        return Row(number, data.decode())
    except UnicodeDecodeError as error:
        return Row(number + data.count(b"\n", 0, error.start), None, not_utf8(data))


def _parse(number: int, data: bytes) -> Row:
    row = _decode(number, data)
    try:
        return row if row.error else Row(number, json.loads(row.content))
    except json.JSONDecodeError as error:
        return Row(number, None, f"not valid JSON: {error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        return Row(number, None, f"not valid JSON: {error}")


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _find_columns(names: Sequence[str], text_key: Sequence[str] | None, keep: Sequence[str] = ()) -> list[str]:
    """Return all names; or the first of `text_key` that is among them, and those to keep that are."""
    if text_key is None:
        return list(names)
    found = [key for key in text_key if key in names]
    if not found:
        raise ValueError(f"no column `{'` or `'.join(text_key)}`; there are: {', '.join(names)}")
    return [found[0], *(key for key in keep if key in names and key != found[0])]


def _check(row: Row, text_key: Sequence[str] | None, keep: Sequence[str]) -> Row:
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
        column = _find_columns(list(row.content), text_key)[0]
    except ValueError as error:
        return Row(row.number, None, str(error))
    text = "" if row.content[column] is None else row.content[column]
    kept = {key: row.content[key] for key in keep if row.content.get(key) is not None}
    error = text_error(text)
    return Row(row.number, None, f"column `{column}` {error}") if error else Row(row.number, text, kept=kept)


def text_error(value: Any) -> str:
    """Say why a value is no text to train on; nothing if it is."""
    if not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    return "holds half a surrogate pair" if LONE_SURROGATE.search(value) else ""
