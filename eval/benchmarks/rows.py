"""Rows of jsonl files for evaluation."""

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Return the rows of a jsonl file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has no rows, a line is not JSON, or one of `columns` is missing or empty in a row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open(encoding="utf-8-sig") as file:
        try:
            rows = [json.loads(line) for line in file]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not one JSON object per line: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is not an object but {type(row).__name__}")
        for column in columns:
            if not row.get(column):
                raise ValueError(f"{path}, row {number}: `{column}` is missing or empty")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
