"""Instruction and preference rows in their standard forms (see chat_schemas.py) as memory-mapped data sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from buddygpt.launch import UserError

from .chat_schemas import BadRow, check_row
from .text_files import find_files, read_rows

# One JSON text a message: an Arrow struct would give every message the keys of all others, filled with None.
FEATURES = {
    "sft": Features({"messages": List(Json()), "tools": List(Json())}),
    "preference": Features({key: List(Json()) for key in ("prompt", "chosen", "rejected")}),
}


def _standard_rows(path: Path, kind: str, version: int) -> Iterator[dict[str, Any]]:
    number = 0
    for number, row, fault in read_rows(path):
        try:
            if fault:
                raise BadRow(fault)
            check_row(row, kind)
        except BadRow as error:
            raise UserError(
                f"{path}:{number}: {error}. Mend or convert the file: "
                f"python data/convert_chat.py --kind {kind} --input {path} --output NEW.jsonl"
            ) from error
        yield {key: row.get(key) for key in FEATURES[kind]}
    if not number:
        raise UserError(f"{path} is empty")


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
