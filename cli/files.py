"""Files that commands read and write: find them, hash them, replace them safely."""

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from buddygpt.cli.errors import UserError

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
COMPRESSIONS = (".gz", ".zst")


def file_type(file: Path | str) -> str:
    """Return the suffix that says how a file is read, without its compression suffix: "a.jsonl.gz" -> ".jsonl"."""
    path = PurePosixPath(file)
    return PurePosixPath(path.stem if path.suffix in COMPRESSIONS else path.name).suffix


def is_data_file(name: Path | str) -> bool:
    """Return True for a visible file of a supported type. `name` is relative to the folder that is searched."""
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return not hidden and file_type(name) in FILE_TYPES


def find_files(patterns: list[str]) -> list[Path]:
    """Return the files that match names, glob patterns and folders, each file once, sorted within a pattern.

    A folder matches all visible data files in it, at any depth.

    Raises:
        UserError: A pattern matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        folder = Path(pattern)
        if folder.is_dir():
            paths = [path for path in sorted(folder.rglob("*")) if is_data_file(path.relative_to(folder))]
        else:
            paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise UserError(f"no file matches `{pattern}`")
        files.update(dict.fromkeys(found))
    return list(files)


def file_sha256(path: str | Path, flush: bool = False) -> str:
    """Return the sha256 of a file's bytes in hexadecimal. `flush` first writes buffered bytes to the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, to be written as a file or a folder, then rename it to `path`.

    A reader never sees a half-written `path`. An existing file is replaced; an existing folder is replaced as a
    whole. If the block raises, the temporary path is deleted and `path` is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    _delete(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        _delete(partial)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
