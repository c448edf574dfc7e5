"""Read the lines and documents of text files, with a bound for the memory that one of them takes.

A line ends with \\n, \\r\\n or \\r.
"""

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 2**16  # bytes or characters to read at once, where a row may be longer
LONGEST_ROW = 2**28  # bytes; a process takes up to five times as much memory for it
MOST_VALUES = 2**24  # in a JSON row; each takes up to 64 bytes
BLANK = re.compile(r"\s*$")


def check_length(length: int) -> None:
    """Raise ValueError if a row is too long."""
    if length > LONGEST_ROW:
        raise ValueError(f"a row is longer than {LONGEST_ROW:,} bytes; split it")


def check_values(row: bytes | str) -> None:
    """Raise ValueError if a JSON row may hold so many values that they do not fit into memory: by its commas."""
    comma = b"," if isinstance(row, bytes) else ","
    if len(row) > MOST_VALUES and row.count(comma) > MOST_VALUES:
        raise ValueError(f"a row has more than {MOST_VALUES:,} commas, so it holds too many values; split it")


def read_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines, their ends included."""
    while data := stream.readline(LONGEST_ROW + 1):
        check_length(len(data))
        if b"\r" in data:
            yield from data.splitlines(keepends=True)
        else:
            yield data


def split_documents(
    stream: BinaryIO, sample_by: str, separator: re.Pattern[str] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of a text file, each with the number of its first line.

    Args:
        sample_by: `document` for the whole file as one document, `line` or `paragraph` for one document in each. Blank
            lines separate paragraphs.
        separator: At each line that begins with a match, another document begins. The match is no part of it.
    """
    if separator:
        yield from _split(stream, separator)
    elif sample_by == "paragraph":
        yield from _split(stream, BLANK)
    elif sample_by == "line":
        yield from enumerate(read_lines(stream), start=1)
    else:
        document = stream.read(LONGEST_ROW + 1)
        check_length(len(document))
        yield 1, document


def _split(stream: BinaryIO, separator: re.Pattern[str]) -> Iterator[tuple[int, bytes]]:
    lines: list[bytes] = []
    first = 1
    length = 0
    for number, line in enumerate(read_lines(stream), start=1):
        text = line.decode(errors="surrogateescape")
        if found := separator.match(text):
            if b"".join(lines).strip():
                yield first, b"".join(lines)
            line = text[found.end() :].encode(errors="surrogateescape")
            lines, first, length = [], number, 0
        lines.append(line)
        length += len(line)
        check_length(length)
    if b"".join(lines).strip():
        yield first, b"".join(lines)


class CsvLines:
    """The lines of a CSV file. A row that is too long is never in memory.

    Args:
        stream: The file.
        errors: What to do with bytes that are not UTF-8, as for `open`.

    Attributes:
        length: Bytes of the lines since this was last set to 0.
    """

    def __init__(self, stream: BinaryIO, errors: str = "surrogateescape") -> None:
        self.text = io.TextIOWrapper(stream, "utf-8", errors=errors, newline="")
        self.length = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        pieces: list[str] = []
        piece = ""
        while not pieces or (len(piece) == CHUNK and not piece.endswith(("\n", "\r"))):
            piece = self.text.readline(CHUNK)
            self.length += len(piece if piece.isascii() else piece.encode(errors="surrogateescape"))
            check_length(self.length)
            pieces.append(piece)
        if not pieces[0]:
            raise StopIteration
        return "".join(pieces)
