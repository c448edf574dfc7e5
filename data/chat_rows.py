"""Instruction and preference rows in their standard forms (see chat_schemas.py) as memory-mapped data sets."""

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, List, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from buddygpt.launch import UserError

from .chat_schemas import BadRow, check_row

# One JSON text a message: an Arrow struct would give every message the keys of all others, filled with None.
FEATURES = {
    "sft": Features({"messages": List(Json()), "tools": List(Json())}),
    "preference": Features({key: List(Json()) for key in ("prompt", "chosen", "rejected")}),
}


def find_files(patterns: list[str]) -> list[Path]:
    """Return the files that the names or globs stand for, sorted within each; UserError where there is none."""
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(str(pattern), recursive=True))
        if not found:
            raise UserError(f"no such file: {pattern}")
        files += [Path(name) for name in found]
    return files


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) of a .json (array or JSON lines), .jsonl, .json[l].gz, .parquet or .csv file.

    Raises:
        UserError: The file is empty, of another type, or malformed; with the line where there is one.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in readers or (path.suffix == ".gz" and readers[suffix] is not _read_json):
        raise UserError(f"{path}: unknown type; use .json, .jsonl, .json.gz, .jsonl.gz, .parquet or .csv")
    number = 0
    try:
        for number, row in enumerate(readers[suffix](path), start=1):
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: the row is not an object but {type(row).__name__}")
            yield number, row
    except UnicodeDecodeError as error:
        line = number + 1 + error.object[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number + error.lineno}: not valid JSON: {error.msg}, column {error.colno}"
        ) from error
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path}: cannot be read after row {number}: {error}") from error
    if not number:
        raise UserError(f"{path} is empty")


def _read_json(path: Path) -> Iterator[Any]:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            file.seek(0)
            yield from json.loads(file.read().decode("utf-8-sig"))
            return
        file.seek(0)
        for line in file:
            yield json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))


def _read_csv(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, restkey="", strict=True):
            if "" in row or None in row.values():
                raise csv.Error("the next row has more or fewer fields than the header")
            yield row


def _read_parquet(path: Path) -> Iterator[Any]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
        yield from map(_without_none, batch.to_pylist())


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _standard_rows(path: Path, kind: str, version: int) -> Iterator[dict[str, Any]]:
    for number, row in read_rows(path):
        try:
            check_row(row, kind)
        except BadRow as error:
            raise UserError(
                f"{path}:{number}: {error}. Mend or convert the file: "
                f"python data/convert_chat.py --kind {kind} --input {path} --output NEW.jsonl"
            ) from error
        yield {key: row.get(key) for key in FEATURES[kind]}


def _load(patterns: list[str], kind: str) -> Dataset:
    parts = []
    for path in find_files(patterns):
        # The time of the last change is part of the cache's key, so that an edited file is read anew.
        source = {"path": path.absolute(), "kind": kind, "version": path.stat().st_mtime_ns}
        try:
            parts.append(Dataset.from_generator(_standard_rows, features=FEATURES[kind], gen_kwargs=source))
        except DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    return concatenate_datasets(parts)


def load_messages(files: list[str]) -> Dataset:
    """Load instruction rows: columns `messages` and `tools` (None where a row has none), all other keys dropped.

    Args:
        files: Names or globs of jsonl or parquet files in the standard form. Read once, then mapped from the cache.

    Raises:
        UserError: A missing, empty or malformed file, or a row that is not in the standard form; with file and row.
    """
    return _load(files, "sft")


def load_preferences(files: list[str]) -> Dataset:
    """Load preference rows: columns `prompt`, `chosen` and `rejected`. Otherwise as [`load_messages`]."""
    return _load(files, "preference")
