"""Read .jsonl, .json, .parquet, .csv, .txt and .md files row by row, plain, .gz or .zst.

for row in read_rows(path):            # row.content is a dict of all columns
for row in read_rows(path, ["text"]):  # row.content is the text in the first of these columns

Each row carries its line number, and an error if it is bad. A path is a local file, or a URL that fsspec opens
(hf://, s3://, memory://, ...) and that is read as a stream.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from buddygpt.cli.encoding import marked_encoding, not_utf8
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_type
from buddygpt.data.text.json_forms import is_conversation, is_message, rows_of_object
from buddygpt.data.text.lines import CHUNK, LONGEST_ROW, CsvLines, check_length, check_values, split_documents

# What to do about the errors of the clients of the Hub and of ModelScope, by the name of their class.
HUB_LOGIN = "run `hf auth login`"
MODELSCOPE_LOGIN = "run `modelscope login --token TOKEN`"
UNREACHABLE = "it cannot be reached: check the network; HF_ENDPOINT names a mirror of the Hub"
REMEDIES = {
    "GatedRepoError": f"it is gated: accept its terms on its page of the Hub, then {HUB_LOGIN}",
    "RepositoryNotFoundError": f"there is no such data set on the Hub; if it is private, {HUB_LOGIN}",
    "RevisionNotFoundError": "the data set has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so the Hub is not asked; HF_HUB_OFFLINE=0 allows it",
    "ConnectError": UNREACHABLE,
    "ConnectTimeout": UNREACHABLE,
    "ConnectionError": UNREACHABLE,
    "NetworkError": UNREACHABLE,
    "RequestTimeoutError": UNREACHABLE,
    "NotExistError": f"there is no such data set on ModelScope; if it is private, {MODELSCOPE_LOGIN}",
    "AuthenticationError": f"ModelScope asks who you are: {MODELSCOPE_LOGIN}",
    "PermissionDeniedError": f"it is gated: accept its terms on its page of ModelScope, then {MODELSCOPE_LOGIN}",
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_TOKEN = 16  # characters of the longest JSON tokens that are invalid in part: `\ud83d\ude00`, `-Infinity`
PARQUET_BUFFER = 2**20  # bytes; without a buffer pyarrow reads a column of a whole row group at once
csv.field_size_limit(LONGEST_ROW)  # the default refuses documents above 128 kB


class Row(NamedTuple):
    """A row of an input file, or its error."""

    number: int  # the line from 1, or the row if the file type has no lines
    content: Any  # a dict of all columns, or the text if columns of text were requested; None if there is an error
    error: str = ""
    kept: dict[str, Any] = {}  # the columns of `keep`, for rows of text


def is_url(file: Path | str) -> bool:
    return isinstance(file, str) and "://" in file


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn any exception into a [`UserError`]: every remote file system has different ones."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url}: cannot be read: {explain(error)}") from error


def explain(error: Exception) -> str:
    """Return what to do about an error of a hub's client, or else its message, as one line."""
    cause: BaseException | None = error
    while cause is not None:  # the Hub's file system turns most errors into FileNotFoundError
        if remedy := REMEDIES.get(type(cause).__name__):
            return remedy
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def file_size(file: Path | str) -> int:
    """Return the size of a file or URL in bytes."""
    if not is_url(file):
        return Path(file).stat().st_size
    with remote_errors(file):
        system, name = fsspec.url_to_fs(file)
        return system.size(name)


def progress_bar(files: Sequence[Path | str], **options: Any) -> tqdm:
    """Return a progress bar over the bytes of the files; [`read_rows`] moves it."""
    return tqdm(total=sum(map(file_size, files)), unit="B", unit_scale=True, **options)


def read_rows(
    path: Path | str,
    text_key: Sequence[str] | None = None,
    bar: tqdm | None = None,
    txt_sample_by: str = "document",
    keep: Sequence[str] = (),
    txt_separator: re.Pattern[str] | None = None,
) -> Iterator[Row]:
    """Yield every row of a file, also bad ones. Memory holds one row at a time, or one batch of a parquet file.

    Args:
        path: A .jsonl, .json (see `_read_json`), .parquet or .csv file or URL. With a `text_key`, also .txt and .md.
        text_key: The first of these columns that a row has is its text; only the text is returned.
        bar: A [`progress_bar`].
        txt_sample_by, txt_separator: How a .txt file is split, see [`split_documents`]. A .md file is one document.
        keep: Other columns to return with the text, if a file has them.

    Raises:
        UserError: The file has another type or no such column, or is damaged so that no further row can be read.
    """
    readers = {
        ".jsonl": partial(_read_json, is_lines=True),
        ".json": partial(_read_json, path=path),
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if text_key:
        readers[".txt"] = partial(_read_txt, sample_by=txt_sample_by, separator=txt_separator)
        readers[".md"] = _read_txt
    suffix = file_type(path)
    if suffix not in readers:
        raise UserError(f"{path}: unknown type `{suffix}`; use one of {', '.join(readers)}")
    bar = tqdm(disable=True) if bar is None else bar
    start = bar.n
    number = 0  # of the last row that was read
    try:
        opened = fsspec.open(path) if is_url(path) else open(path, "rb")  # noqa: SIM115
        with opened as raw, decompress(raw, PurePosixPath(path).suffix.lower()) as stream:
            if suffix != ".parquet":  # its bytes are no text
                skip_byte_order_mark(stream)
            for row in readers[suffix](stream, text_key, keep):
                number = row.number
                bar.update(start + raw.tell() - bar.n)
                yield _select(row, text_key, keep)
    except Exception as error:
        # These are the errors of damaged files. A remote file system may raise any other.
        known = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, csv.Error)
        if not isinstance(error, known) and not is_url(path):
            raise
        place = f"{path}:{number}" if number else str(path)
        raise UserError(f"{place}: cannot be read: {explain(error) if is_url(path) else one_line(error)}") from error


def _select(row: Row, text_key: Sequence[str] | None, keep: Sequence[str]) -> Row:
    """Return the row as requested: all columns, or its text and the columns of `keep`. A bad row gets an error."""
    if row.error:
        return row
    if is_conversation(row.content):
        row = row._replace(content={"messages": row.content})  # a conversation
    if not isinstance(row.content, dict):
        return Row(row.number, None, f"the row is not an object but {type(row.content).__name__}")
    if text_key is None:
        return row
    if not row.content:  # a blank line, or an empty cell of a parquet file
        return Row(row.number, "")
    try:
        column = _find_columns(list(row.content), text_key)[0]
    except ValueError as error:
        return Row(row.number, None, str(error))
    text = "" if row.content[column] is None else row.content[column]
    if error := text_error(text):
        return Row(row.number, None, f"column `{column}` {error}")
    return Row(row.number, text, kept={key: row.content[key] for key in keep if row.content.get(key) is not None})


def text_error(value: Any) -> str:
    """Return why a value cannot be trained on as text, or an empty string if it can."""
    if not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    return "holds half a surrogate pair" if LONE_SURROGATE.search(value) else ""


def _find_columns(names: Sequence[str], text_key: Sequence[str] | None, keep: Sequence[str] = ()) -> list[str]:
    """Return the columns to read: all, or the first of `text_key` that exists, then those of `keep` that exist.

    Raises:
        ValueError: No column of `text_key` exists.
    """
    if text_key is None:
        return list(names)
    found = [key for key in text_key if key in names]
    if not found:
        raise ValueError(f"no column `{'` or `'.join(text_key)}`; there are: {', '.join(names)}")
    return [found[0], *(key for key in keep if key in names and key != found[0])]


def decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":  # Python's zstandard module accepts truncated files
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


def skip_byte_order_mark(stream: BinaryIO) -> None:
    start = stream.peek(4)
    if encoding := marked_encoding(start):
        raise ValueError(f"it is {encoding}; convert it with `iconv -f {encoding} -t UTF-8`")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(3)


def _read_json(
    stream: BinaryIO,
    text_key: Sequence[str] | None,
    keep: Sequence[str],
    is_lines: bool = False,
    path: Path | str = "",
) -> Iterator[Row]:
    """Read an array of rows, a row per line, rows that span several lines, or one object of rows or of columns.

    Blank lines are no rows. A list of messages is a row too, see `_select`.

    Args:
        is_lines: An object on the only line is a row, whatever it holds.
        path: For a message about several lists of rows.
    """
    if stream.peek(1).lstrip().startswith(b"["):
        yield from _read_array(stream)
        return
    lines = ((number, line.rstrip()) for number, line in enumerate(_json_lines(stream), start=1) if line.strip())
    number, line = next(lines, (0, b""))
    if not number:
        return
    if _continues(line):
        decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        rows = _read_values(stream, decode(line + b"\n"), number, decode)
        is_lines = False
    else:
        rows = (_parse_line(*each) for each in chain([(number, line)], lines))
    first = next(rows)
    found = {} if is_lines else rows_of_object(first.content)
    second = next(rows, None) if found else None
    if not found or second:
        yield from chain([first], [second] if second else [], rows)
        return
    if len(found) > 1:
        _tell(f"{path}: all its lists are read: {', '.join(f'{name} ({len(found[name]):,} rows)' for name in found)}")
    for number, content in enumerate(chain.from_iterable(found.values()), start=1):
        yield Row(number, content)


@cache  # a file is read more than once
def _tell(message: str) -> None:
    print(message)


def _continues(line: bytes) -> bool:
    """Return True if a line is the beginning of an object that ends on another line."""
    try:
        check_values(line)
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.endswith((b"{", b"[", b",", b":")) and error.pos >= len(error.doc) - 1
    except (ValueError, RecursionError):  # the line is wrong in another way, which its reader reports
        pass
    return False


def _read_values(stream: BinaryIO, text: str, number: int, decode: Callable[[bytes], str]) -> Iterator[Row]:
    """Parse JSON values that follow each other, each on any number of lines.

    Args:
        text: The beginning of the stream, which has been read.
        number: The line of its first character.
        decode: An incremental decoder that has read `text`.
    """
    start = 0
    while True:
        begin = _skip_space(text, start)
        number += text.count("\n", start, begin)
        start = begin
        try:
            content, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            reason = _encoding_error(text) or f"not valid JSON: {getattr(error, 'msg', error)}"
            if not _may_be_incomplete(text, error):
                raise ValueError(f"the object at line {number}: {reason}") from error
            more = stream.read(max(CHUNK, len(text) - start))
            check_length(len(text) - start)
            if not more:
                if start < len(text):
                    yield Row(number, None, reason)
                return
            text = text[start:] + decode(more)
            check_values(text)
            start = 0
            continue
        error = _encoding_error(text[start:end])
        yield Row(number, None if error else content, error)
        number += text.count("\n", start, end)
        start = end


def _json_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; a line in which \\r ends rows is split there."""
    while line := stream.readline(LONGEST_ROW + 1):
        check_length(len(line))
        first, _, rest = line.strip().partition(b"\r")
        if rest and not _parse_line(0, first).error:
            yield from line.splitlines()
        else:
            yield line


def _parse_line(number: int, data: bytes) -> Row:
    try:
        check_values(data)
    except ValueError as error:
        return Row(number, None, str(error))
    row = _decode(number, data)
    if row.error:
        return row
    try:
        return Row(number, json.loads(row.content))
    except json.JSONDecodeError as error:
        return Row(number, None, f"not valid JSON: {error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, brackets nested as deep
        return Row(number, None, f"not valid JSON: {error}")


def _read_array(stream: BinaryIO) -> Iterator[Row]:
    """Parse a JSON array element by element. (ijson takes minutes for a string of 50 MB.)

    `text[start:]` has been read and not been parsed yet. It is one element and a chunk at most.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text = decode(stream.read(CHUNK))
    start = text.index("[") + 1
    number = 1
    is_open = True
    while is_open:
        start = _skip_space(text, start)
        if number == 1 and text[start : start + 1] == "]":  # the array is empty
            start += 1
            break
        try:
            content, end = _parse_element(text, start)
        except (ValueError, RecursionError) as error:
            # Read on if the element may be incomplete. Each time the text doubles, so that parsing it again and again
            # takes linear time.
            more = b""
            if _may_be_incomplete(text, error):
                more = stream.read(max(CHUNK, len(text) - start))
                check_length(len(text) - start)
            if not more:
                reason = _encoding_error(text) or f"not valid JSON: {getattr(error, 'msg', error)}"
                raise ValueError(f"row {number}: {reason}") from error
            text = text[start:] + decode(more)
            check_values(text)
            start = 0
            continue
        if number == 1 and is_message(content):  # the array is no list of rows but a row: a list of messages
            yield from _read_values(stream, "[" + text[start:], 1, decode)
            return
        error = _encoding_error(text[start:end])
        yield Row(number, None if error else content, error)
        is_open = text[end] == ","
        start = end + 1
        number += 1
    rest = text[start:] + decode(stream.read(CHUNK))
    if _skip_space(rest, 0) < len(rest):
        raise ValueError("there is more after the end of the array")


def _skip_space(text: str, start: int) -> int:
    return SPACE.match(text, start).end()


def _parse_element(text: str, start: int) -> tuple[Any, int]:
    """Return the element that begins at `start`, and the index of the `,` or `]` after it.

    Raises:
        ValueError, RecursionError: The element is not valid JSON, or its end has not been read yet.
    """
    content, end = json.JSONDecoder().raw_decode(text, start)
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):  # also if the text ends here: then the element may be a number's start
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return content, end


def _may_be_incomplete(text: str, error: Exception) -> bool:
    """Return True if the error may only mean that the text ends too early: it is near the end, or in a string."""
    if str(error).startswith("Unterminated"):
        return True
    return getattr(error, "pos", 0) >= len(text) - LONGEST_TOKEN


def _encoding_error(text: str) -> str:
    """Return the error of text that was decoded with errors="surrogateescape"; an empty string if it was UTF-8."""
    try:
        text.encode()
        return ""
    except UnicodeEncodeError:
        return not_utf8(text.encode(errors="surrogateescape"))


def _read_parquet(stream: BinaryIO, text_key: Sequence[str] | None, keep: Sequence[str]) -> Iterator[Row]:
    # A buffer for a remote file would fetch the bytes of the other columns too.
    is_local = isinstance(getattr(stream, "raw", None), io.FileIO)
    number = 0
    with pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER if is_local else 0) as file:
        columns = _find_columns(file.schema_arrow.names, text_key, keep)
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_struct_array():
                number += 1
                try:
                    yield Row(number, _without_none(row.as_py()))
                except UnicodeDecodeError as error:
                    yield Row(number, None, not_utf8(error.object))


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _read_csv(stream: BinaryIO, text_key: Sequence[str] | None, keep: Sequence[str]) -> Iterator[Row]:
    lines = CsvLines(stream)
    rows = csv.DictReader(lines, strict=True)
    columns = _find_columns(rows.fieldnames or [], text_key, keep)
    for row in rows:
        lines.length = 0
        # DictReader fills missing cells with None, and stores surplus cells under the key None.
        missing = [column for column in columns if row[column] is None]
        if missing:
            yield Row(rows.line_num, None, f"the row ends before column `{missing[0]}`")
            continue
        if None in row:
            yield Row(rows.line_num, None, "the row is longer than the header")
            continue
        # `line_num` is the last line of the row; an error is reported at the line that has it.
        text = "".join(row[column] for column in columns)
        number = rows.line_num - text.count("\n")
        escaped = LONE_SURROGATE.search(text)
        if escaped:
            line = number + text.count("\n", 0, escaped.start())
            yield Row(line, None, not_utf8(text.encode(errors="surrogateescape")))
        else:
            yield Row(number, row)


def _read_txt(
    stream: BinaryIO,
    text_key: Sequence[str],
    keep: Sequence[str],
    sample_by: str = "document",
    separator: re.Pattern[str] | None = None,
) -> Iterator[Row]:
    for number, data in split_documents(stream, sample_by, separator):
        row = _decode(number, data)
        yield row if row.error else Row(number, {text_key[0]: row.content})


def _decode(number: int, data: bytes) -> Row:
    try:
        return Row(number, data.decode())
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        return Row(line, None, not_utf8(data))
