"""Files that commands read and write: find them, hash them, replace them safely."""

import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import psutil

from buddygpt.cli.errors import UserError, file_system_errors, reading

ROW_TYPES = (".jsonl", ".json", ".parquet", ".csv")  # files of rows with columns
FILE_TYPES = (*ROW_TYPES, ".txt", ".md")
COMPRESSIONS = (".gz", ".zst")
LARGEST_JSON = 100_000_000  # bytes of a file that is read as a whole, which takes up to ten times as much memory


def file_type(file: Path | str) -> str:
    """Return the suffix that says how a file is read, without its compression suffix: "a.JSONL.gz" -> ".jsonl"."""
    path = PurePosixPath(str(file).lower())
    return PurePosixPath(path.stem if path.suffix in COMPRESSIONS else path.name).suffix


def find_files(patterns: list[str], types: Collection[str] = FILE_TYPES) -> list[Path]:
    """Return the files that match names, glob patterns and folders, each file once, sorted within a pattern.

    A folder matches all visible files of these types in it, at any depth. What else it holds is printed.

    Raises:
        UserError: A pattern matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            names = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if each.is_file()]
            found = [path / name for name in select_data_files(pattern, names, types)]
        elif path.is_file():  # also if its name looks like a pattern: a[1].jsonl
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not found:
            raise UserError(f"no file matches `{pattern}`")
        files.update(dict.fromkeys(found))
    return list(files)


def select_data_files(folder: str, names: list[str], types: Collection[str] = FILE_TYPES) -> list[str]:
    """Return the visible files of these types among the files of a folder, and print what is left out.

    README.md is left out of a folder with rows, because it describes them.

    Raises:
        UserError: Nothing is left.
    """
    names = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    has_rows = any(file_type(name) in ROW_TYPES for name in names)
    selected: list[str] = []
    skipped: dict[str, list[str]] = {}
    for name in names:
        file = PurePosixPath(name)
        if has_rows and file.name.lower() == "readme.md":
            skipped.setdefault("README.md", []).append(name)
        elif file_type(name) in types:
            selected.append(name)
        else:
            skipped.setdefault(file_type(name) or file.suffix or "without a suffix", []).append(name)
    if not skipped:
        return selected

    kinds = ", ".join(f"{len(group)} {kind} ({group[0]})" for kind, group in skipped.items())
    if not selected:
        raise UserError(f"no file matches `{folder}`: it holds {kinds}; use {', '.join(types)}")
    total = sum(map(len, skipped.values()))
    _print_once(f"skipped {total:,} of {len(names):,} files in {folder}, which are not read here: {kinds}")
    return selected


@cache
def _print_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: It is damaged, larger than any that a command writes, or no file.
        FileNotFoundError: It does not exist.
    """
    with reading(path):
        if path.stat().st_size > LARGEST_JSON or not path.is_file():
            raise ValueError(f"not a file of at most {LARGEST_JSON:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))


def file_sha256(path: str | Path, flush: bool = False) -> str:
    """Return the sha256 of a file's bytes in hexadecimal. `flush` first writes buffered bytes to the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_output(path: Path, kind: Literal["file", "folder"] | None = None) -> None:
    """Raise UserError if nothing can be written at `path`: it has no name, is no file or folder, or is below none.

    A link to nothing is refused, too: it is likely that of a disk that is not there. With `kind`, so is an existing
    path of the other kind: a command that computes for long calls this before it begins.
    """
    if not path.name:
        raise UserError(f"{path} cannot be replaced; name a new file or folder")
    with file_system_errors():
        try:
            found = stat.S_IFMT(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            found = None  # to be made
        names = {None: kind, stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
        if found not in names:
            raise UserError(f"{path} is a device, a pipe or the like, and cannot be replaced; name a file or folder")
        if kind and names[found] != kind:
            raise UserError(f"{path} is a {names[found]}; name a {kind}")
        parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        for place in (path, parent):
            if place.is_symlink() and not place.exists():
                raise UserError(
                    f"{place} is a link to {os.readlink(place)}, which does not exist; make that, or name another "
                    "file or folder"
                )
        if not stat.S_ISDIR(os.stat(parent).st_mode):
            raise UserError(f"{path} cannot be written, because {parent} is no folder")
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {parent}: {error.strerror}") from error


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path near `path`, to be written as a file or a folder, then rename it to `path`.

    A reader never sees a half-written `path`. An existing file is replaced; an existing folder is replaced as a
    whole. If the block raises, `path` is unchanged. The temporary path lies in a new hidden folder next to `path`,
    which is deleted in any case; if the process is killed, by the next one that writes `path`.
    """
    require_output(path)
    if path.is_symlink():
        path = path.resolve()  # the link stays, and what it names is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name[:40]}."
    for left in path.parent.glob(f"{glob.escape(name)}*.partial"):
        process = left.name.removeprefix(name).partition(".")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)) and not (left / "replaced").exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}{os.getpid()}.", suffix=".partial", dir=path.parent) as work:
        partial = Path(work) / path.name
        yield partial
        require_output(path, "folder" if partial.is_dir() else "file")
        if partial.is_dir() and path.is_dir():
            os.replace(path, Path(work) / "replaced")
        os.replace(partial, path)
