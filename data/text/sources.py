"""Sources of pretraining text: the entries of a YAML's `sources`, their files, and the step that reads them.

    sources:
      - wikipedia                                    # a reader's or its data set's name: streamed from the Hub
      - data/books                                   # a file, glob or folder on this machine, column `text`
      - {reader: ultra-fineweb, min_score: 0.85, language: en}
      - {name: web, path: ['data/web/*.jsonl.zst'], text_key: [content], min_score: 3, epochs: 2}
      - {reader: skypile, path: 'ms://OWNER/NAME/data/*.jsonl'}      # downloaded from ModelScope
      - {path: 'hf://datasets/OWNER/NAME@REVISION/**/*.parquet'}     # any other data set of the Hub

`HF_ENDPOINT` names a mirror of the Hub. The readers are in text_readers.py, and data/README.md lists them.
"""

import contextlib
import glob
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter
from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import FILE_TYPES, file_sha256, file_type, find_files, is_data_file
from buddygpt.data.text.readers import COLUMNS, HUB_NAMES, READERS, Reader
from buddygpt.data.text.rows import Row, is_url, progress_bar, read_rows, remote_errors, text_error

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_texts(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and value and all(map(is_text, value)))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# What an entry may say, and what is right there. Thresholds, `min_...`, depend on the reader.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "reader": (is_text, "its name"),
    "path": (is_texts, "a path or a list of paths"),
    "name": (lambda value: is_text(value) and re.fullmatch(r"[\w.-]+", value), "letters, digits, `.`, `-` and `_`"),
    "language": (is_text, "a name such as zh"),
    "epochs": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "weight": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "clean": (is_text, "the name of a profile"),
    "text_key": (is_texts, "a column or a list of columns"),
    "txt_sample_by": (lambda value: value in ("document", "line"), "document or line"),
    "languages": (is_texts, "a folder's name or a list of them"),
}


@dataclass(frozen=True)
class Source:
    """One entry of `sources`, its files found: plain data, for a worker process or a plan to hold."""

    name: str
    files: tuple[str, ...]  # paths on this machine, or URLs
    reader: str = COLUMNS.name
    language: str | None = None
    epochs: float = 1.0
    weight: float | None = None
    clean: str | None = None
    text_key: tuple[str, ...] = ("text",)
    txt_sample_by: str = "document"  # or "line"
    minimums: dict[str, float] = field(default_factory=dict)  # number in the metadata: the least that is kept


def read_sources(entries: list[str | dict[str, Any]], **defaults: Any) -> list[Source]:
    """Return the sources that entries of the YAML stand for; the files of ms:// are downloaded here.

    Args:
        entries: A path, glob, URL, reader's or data set's name; or a mapping, see the top of this file.
        defaults: `text_key`, `txt_sample_by` and `clean` of the entries that say nothing else.

    Raises:
        UserError: A key or value that no source takes, no file found, or a name or file that occurs twice.
    """
    sources: dict[str, Source] = {}
    owners: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            source = _read_source(_as_mapping(entry), defaults, sources)
        except ValueError as error:
            raise UserError(f"sources, entry {number}: {error}") from error
        for file in source.files:
            if owners.setdefault(file, source.name) != source.name:
                raise UserError(f"{file} is in source `{owners[file]}` and in `{source.name}`; `epochs` repeats one")
        sources[source.name] = source
    return list(sources.values())


def _as_mapping(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        reader = entry if entry in READERS else HUB_NAMES.get(entry)
        return {"reader": reader} if reader else {"path": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"`{entry}` is neither a path nor a mapping of keys")
    return {key: value for key, value in entry.items() if value is not None}


def _read_source(entry: dict[str, Any], defaults: dict[str, Any], taken: Collection[str]) -> Source:
    """Build one source. Raises ValueError where the entry is wrong, UserError where its files are."""
    if entry.get("reader", COLUMNS.name) not in list(READERS):
        raise ValueError(f"there is no reader `{entry['reader']}`; use one of {', '.join(READERS)}")
    reader = READERS[entry.get("reader", COLUMNS.name)]
    _check(entry, reader)
    paths, language = _find_paths(entry, reader)
    files = list(dict.fromkeys(file for path in paths for file in find_source_files(path)))
    if "languages" in entry:
        files = _in_folders(files, _as_list(entry["languages"]))
    if unknown := [file for file in files if file_type(file) not in FILE_TYPES]:
        raise ValueError(f"{unknown[0]}: unknown type; use one of {', '.join(FILE_TYPES)}, or these as .gz or .zst")
    name = entry.get("name") or _free_name(paths[0] if reader is COLUMNS else reader.name, taken)
    if name in taken:
        raise ValueError(f"another source is called `{name}`; give each its own `name`")
    thresholds = {key: float(value) for key, value in entry.items() if key.startswith("min_")}
    settings = {key: value for key, value in {**defaults, **entry}.items() if key in ("clean", "txt_sample_by")}
    return Source(
        name,
        tuple(files),
        reader.name,
        language,
        epochs=float(entry.get("epochs", 1)),
        weight=float(entry["weight"]) if "weight" in entry else None,
        text_key=reader.text_key or tuple(_as_list(entry.get("text_key", defaults.get("text_key", "text")))),
        minimums={reader.minimums.get(key, key.removeprefix("min_")): least for key, least in thresholds.items()},
        **settings,
    )


def _check(entry: dict[str, Any], reader: Reader) -> None:
    """Raise ValueError for a key that the reader does not take, or a wrong value."""
    keys = KEYS | dict.fromkeys(reader.minimums, (is_number, "a number"))
    if reader is COLUMNS:
        keys |= {key: (is_number, "a number") for key in entry if key.startswith("min_")}
    own = {COLUMNS.name: ("text_key", "txt_sample_by"), "starcoderdata": ("languages",)}
    for name, only in own.items():
        keys = {key: check for key, check in keys.items() if reader.name == name or key not in only}
    for key, value in entry.items():
        if key not in keys:
            raise ValueError(f"reader `{reader.name}` takes no key `{key}`; it takes: {', '.join(keys)}")
        is_right, wanted = keys[key]
        if not is_right(value):
            raise ValueError(f"{key} is `{value}`; use {wanted}")


def _find_paths(entry: dict[str, Any], reader: Reader) -> tuple[list[str], str | None]:
    """Return where the text is, and its language: as the entry says, else as the reader knows."""
    language = entry.get("language")
    if "path" in entry:  # files of one's own may be in any of a set's languages
        return _as_list(entry["path"]), language or (next(iter(reader.files)) if len(reader.files) == 1 else None)
    if not reader.hub:
        raise ValueError(f"reader `{reader.name}` knows no place on the Hub; name the files as `path`")
    language = language or next(iter(reader.files))
    if language not in reader.files:
        raise ValueError(
            f"reader `{reader.name}` knows {', '.join(reader.files)} on the Hub; for others name a `path`"
        )
    return [f"hf://datasets/{reader.hub}/{reader.files[language]}"], language


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _free_name(path: str, taken: Collection[str]) -> str:
    """Name a source by its file, or its folder where that is a pattern; by a number too if that name is taken."""
    plain = [part.split(".")[0] for part in PurePosixPath(path).parts if not glob.has_magic(part)]
    name = re.sub(r"[^\w-]+", "-", next((part for part in reversed(plain) if part.strip("/")), "text"))
    return next(free for n in count(1) if (free := name if n == 1 else f"{name}-{n}") not in taken)


def _in_folders(files: list[str], names: list[str]) -> list[str]:
    """Return the files that lie in folders of these names; ValueError for a name without files."""
    folders = {file: PurePosixPath(file).parent.name for file in files}
    for name in names:
        if name not in folders.values():
            raise ValueError(f"languages: no folder `{name}`; there are: {', '.join(sorted(set(folders.values())))}")
    return [file for file in files if folders[file] in names]


def find_source_files(path: str) -> list[str]:
    """Return the files that a path, glob, folder or URL stands for, sorted; UserError where there is none."""
    if path.startswith("ms://"):
        return _download_from_modelscope(path)
    if not is_url(path):
        if HUB_NAME.fullmatch(path) and not is_data_file(path) and not Path(path).exists():
            hubs = f"a data set of the Hub is `hf://datasets/{path}`, of ModelScope `ms://{path}`"
            raise UserError(f"no file matches `{path}`; {hubs}")
        return [str(file) for file in find_files([path])]
    with remote_errors(path):
        system, pattern = fsspec.url_to_fs(path)
        if not glob.has_magic(pattern) and system.isdir(pattern):
            start = len(pattern.rstrip("/")) + 1
            found = [name for name in system.find(pattern) if is_data_file(name[start:])]
        else:
            found = [name for name, info in system.glob(pattern, detail=True).items() if info["type"] == "file"]
    if not found:
        raise UserError(f"no file matches `{path}`")
    return [system.unstrip_protocol(name) for name in sorted(found)]


def _download_from_modelscope(url: str) -> list[str]:
    """Fetch ms://OWNER/NAME/PATH, a file, glob or folder, into ModelScope's cache, and return the files.

    What is there already is not fetched again.
    """
    from modelscope import dataset_snapshot_download  # takes seconds to import

    owner, name, pattern = f"{url.removeprefix('ms://')}//".split("/", 2)
    if not (owner and name):
        raise UserError(f"{url}: write ms://OWNER/NAME, or ms://OWNER/NAME/GLOB")
    pattern = pattern.rstrip("/")
    allowed, ignored = [pattern, f"{pattern}/*"] if pattern else [], []
    if glob.has_magic(pattern):  # its patterns are fnmatch's, where ** wants at least one folder, and * crosses them
        allowed = [pattern, pattern.replace("**/", "")]
        ignored = [] if "**" in pattern else ["/".join("*" * (pattern.count("/") + 2))]
    with remote_errors(url):
        folder = dataset_snapshot_download(f"{owner}/{name}", allow_patterns=allowed, ignore_patterns=ignored)
    try:
        return [str(file) for file in find_files([str(Path(glob.escape(folder), pattern))])]
    except UserError:  # it names the cache
        raise UserError(f"no file matches `{url}`") from None


def describe_file(file: str) -> dict[str, Any]:
    """Return `file`, `bytes` and `sha256` of a file; of a URL, what its hub or store says without a download.

    A hub has the sha256 of large files; of others the mark of a version stands there, as `git:...` or `etag:...`.
    """
    if not is_url(file):
        return {"file": file, "bytes": Path(file).stat().st_size, "sha256": file_sha256(Path(file))}
    with remote_errors(file):
        system, name = fsspec.url_to_fs(file)
        info = system.info(name)
        version = f"git:{info['blob_id']}" if info.get("blob_id") else f"etag:{info.get('ETag') or system.ukey(name)}"
        return {"file": file, "bytes": info["size"], "sha256": info["lfs"]["sha256"] if info.get("lfs") else version}


class SourceReader(PipelineStep):
    """Yields the documents of one source's files. datatrove's own readers log bad rows and go on without them.

    Args:
        assignments: What each rank reads: a source, and those of its files that are meant.
        on_bad_row: A row that cannot be read stops the run (`stop`), or is named and counted (`skip`).
        exclusion_writer: Takes the documents below a threshold of their source, and what is wrong with bad rows.
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

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, files = self.assignments[rank]
        exclusions = self.exclusion_writer or contextlib.nullcontext()
        with progress_bar(files, desc=f"{source.name} {rank + 1}/{world_size}", leave=False) as bar, exclusions:
            for file, row in _rows(source, files, bar):
                self.stat_update("read")
                try:
                    document = _make_document(source, file, row)
                    rule = _below_minimum(source, document)
                except ValueError as error:
                    document, rule = self._bad_row(f"{file}:{row.number}", error), "bad_row"
                if rule:
                    self._drop(document, rule, rank)
                else:
                    yield document

    def _bad_row(self, place: str, error: ValueError) -> Document:
        """Stop, or return the error as a document that stands for the row."""
        if self.on_bad_row == "stop":
            raise UserError(f"{place}: {error}. Mend it, or set `on_bad_row: skip`.")
        tqdm.write(f"skipped {place}: {error}", file=sys.stderr)
        return Document(str(error), id=place)

    def _drop(self, document: Document, rule: str, rank: int) -> None:
        self.stat_update(f"dropped_{rule}")
        if self.exclusion_writer:
            document.metadata["filter_reason"] = rule
            self.exclusion_writer.write(document, rank)


def _rows(source: Source, files: tuple[str, ...], bar: tqdm) -> Iterator[tuple[str, Row]]:
    reader = READERS[source.reader]
    keep = tuple(dict.fromkeys((*reader.keep, *source.minimums)))
    for file in files:
        path = file if is_url(file) else Path(file)
        if reader.read:
            rows = read_rows(path, bar=bar)
        else:
            rows = read_rows(path, source.text_key, bar, source.txt_sample_by, keep)
        yield from ((file, row) for row in rows)


def _make_document(source: Source, file: str, row: Row) -> Document:
    """Turn a row into a document. Raises ValueError where that is not possible."""
    if row.error:
        raise ValueError(row.error)
    read = READERS[source.reader].read if row.content else None  # nothing to read in a blank line
    try:
        text, metadata = read(row.content) if read else (row.content or "", _numbers(row.kept))
    except KeyError as error:
        raise ValueError(f"no column `{error.args[0]}`; there are: {', '.join(row.content)}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a row of `{source.reader}`: {error}") from error
    if read and (error := text_error(text)):  # columns were looked at by read_rows
        raise ValueError(f"the text {error}")
    return Document(text, id=f"{file}:{row.number}", metadata={"source": source.name} | metadata)


def _numbers(columns: dict[str, Any]) -> dict[str, float]:
    """Return those of the columns that are numbers, or strings of numbers, as some sets have them."""
    numbers = {}
    for key, value in columns.items():
        with contextlib.suppress(ValueError, TypeError):
            numbers[key] = float(value) if isinstance(value, str) else value + 0
    return numbers


def _below_minimum(source: Source, document: Document) -> str:
    """Return the rule that drops the document, `low_...`; nothing where it passes every threshold."""
    for key, least in source.minimums.items():
        if document.text and key not in document.metadata:
            raise ValueError(f"`{key}` has a minimum, and is no number here")
        if not document.metadata.get(key, least) >= least:  # NaN is below, too
            return f"low_{key}"
    return ""
