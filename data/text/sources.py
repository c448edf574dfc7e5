"""Find the files of every source of pretraining text that a YAML lists.

    sources:
      - wikipedia                                    # a name from data/sources.yaml: streamed from the Hub
      - datasets/books                               # a file, glob or folder on this machine, column `text`
      - {reader: ultra-fineweb, min_score: 0.85, language: en}
      - {name: web, path: ['datasets/web/*.jsonl.zst'], text_key: [content], min_score: 3, epochs: 2}
      - {reader: skypile, path: 'ms://OWNER/NAME/data/*.jsonl'}      # downloaded from ModelScope
      - {path: 'hf://OWNER/NAME@REVISION/**/*.parquet'}              # any other data set of the Hub, see hubs.py

readers.py then reads the files.
"""

import glob
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import FILE_TYPES, file_type
from buddygpt.data.text.hubs import find_source_files
from buddygpt.data.text.rows import one_line

PUBLIC_SETS = Path(__file__).parents[1] / "sources.yaml"
COLUMNS = "columns"  # the reader of any file: `text_key` and `min_COLUMN` come from the user's YAML


@strict
@dataclass(kw_only=True)
class Reader:
    """An entry of data/sources.yaml: a data set and how its rows become text. The file explains the keys."""

    name: str
    hub: str = ""
    files: dict[str, str | None] = field(default_factory=dict)
    text_key: list[str] = field(default_factory=list)
    join: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    function: str = ""
    keep: list[str] = field(default_factory=list)
    minimums: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    title: str = ""
    about: str = ""
    size: str = ""
    license: str = ""
    example: str = ""

    def validate_text(self) -> None:
        ways = [way for way in (self.text_key, self.join, self.function) if way]
        if len(ways) != 1 and self.name != COLUMNS:
            raise ValueError("give one of text_key, join and function")


@cache
def load_readers(path: Path = PUBLIC_SETS) -> dict[str, Reader]:
    """Return the readers of data/sources.yaml by name.

    Raises:
        UserError: An entry has an unknown key or a wrong value.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from error
    readers = {}
    for name, entry in entries.items():
        try:
            readers[name] = Reader(name=name, **entry)
        except (StrictDataclassError, TypeError) as error:
            raise UserError(f"{path}: `{name}`: {one_line(error)}") from error
    return readers


def _is_filled(value: str | list[str]) -> bool:
    """Return True if there is a text, or at least one in a list, and none is blank."""
    texts = _as_list(value)
    return bool(texts) and all(text.strip() for text in texts)


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _are_finite(numbers: dict[str, float]) -> bool:
    return all(math.isfinite(number) for number in numbers.values())


def _key(use: str, is_right: Callable[[Any], bool] = _is_filled, default: Any = None) -> Any:
    """Return a field of [`SourceEntry`]. `use` names the right values in an error message."""

    def validate(value: Any) -> None:
        if value is not None and not is_right(value):
            raise ValueError(f"use {use}")

    return validated_field(validate, default=default, metadata={"use": use})


@strict
@dataclass(kw_only=True)
class SourceEntry:
    """An entry of `sources` in the user's YAML. Every assignment checks the type and the value."""

    reader: str = _key("its name", default=COLUMNS)
    path: str | list[str] | None = _key("a path or a list of paths")
    name: str | None = _key("letters, digits, `.`, `-` and `_`", re.compile(r"[\w.-]+").fullmatch)
    language: str | None = _key("a name such as zh")
    epochs: int | float = _key("a number above 0", _is_positive, default=1)
    weight: int | float | None = _key("a number above 0", _is_positive)
    clean: str | None = _key("the name of a profile")
    text_key: str | list[str] | None = _key("a column or a list of columns")
    txt_sample_by: Literal["document", "paragraph", "line"] | None = _key("document, paragraph or line")
    txt_separator: str | None = _key("a regular expression", _is_pattern)
    languages: str | list[str] | None = _key("a folder's name or a list of them")
    minimums: dict[str, int | float] | None = _key("a number", _are_finite)  # metadata: the least value to keep


# Keys of `SourceEntry` that not every reader takes. Users write `minimums` as `min_...`.
SOME_READERS_ONLY = ("text_key", "txt_sample_by", "txt_separator", "languages", "minimums")
USE = {each.name: each.metadata["use"] for each in fields(SourceEntry)}


@dataclass(frozen=True)
class Source:
    """A source with its files: plain data, which workers and plans store."""

    name: str
    files: tuple[str, ...]  # paths on this machine, or URLs
    reader: str = COLUMNS
    language: str | None = None
    epochs: float = 1.0
    weight: float | None = None
    clean: str | None = None
    text_key: tuple[str, ...] = ("text",)
    txt_sample_by: str = "document"  # or "paragraph" or "line"
    txt_separator: str | None = None
    minimums: dict[str, float] = field(default_factory=dict)  # metadata: the least value that is kept


def read_sources(entries: list[str | dict[str, Any]], **defaults: Any) -> list[Source]:
    """Return a [`Source`] for each entry of `sources` in the YAML. Files of ms:// are downloaded here.

    Args:
        entries: A path, glob, URL, or the name of a reader or its data set; or a mapping, see the top of this file.
        defaults: `text_key`, `txt_sample_by`, `txt_separator` and `clean` for the entries that do not set them.

    Raises:
        UserError: An unknown key, a wrong value, no file found, or a name or file that occurs twice.
    """
    sources: dict[str, Source] = {}
    owners: dict[str, str] = {}  # file: name of the source
    for number, entry in enumerate(entries, start=1):
        try:
            source = _read_source(_as_mapping(entry), defaults, sources)
        except ValueError as error:
            raise UserError(f"sources, entry {number}: {error}") from error
        for file in source.files:
            owner = owners.setdefault(file, source.name)
            if owner != source.name:
                raise UserError(f"{file} is in source `{owner}` and in `{source.name}`; to repeat it, use `epochs`")
        sources[source.name] = source
    return list(sources.values())


def _as_mapping(entry: Any) -> dict[str, Any]:
    """Return the keys of an entry. A bare string is the name of a reader, the name of its data set, or a path."""
    if isinstance(entry, str):
        for reader in load_readers().values():
            if entry == reader.name or (reader.hub and entry == reader.hub):
                return {"reader": reader.name}
        return {"path": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"`{entry}` is neither a path nor a mapping of keys")
    return {key: value for key, value in entry.items() if value is not None}


def _read_source(given: dict[str, Any], defaults: dict[str, Any], taken: Collection[str]) -> Source:
    """Return the source of one entry.

    Raises:
        ValueError: The entry is wrong.
        UserError: Its files cannot be found.
    """
    readers = load_readers()
    name = given.get("reader", COLUMNS)
    if name not in list(readers):  # a list, because the YAML may hold something that cannot be a key of a dict
        raise ValueError(f"there is no reader `{name}`; use one of {', '.join(readers)}")
    reader = readers[name]
    entry = _check_entry(given, reader)

    # Find the files, each once.
    paths, language = _find_paths(entry, reader)
    files: dict[str, None] = {}
    for path in paths:
        files.update(dict.fromkeys(find_source_files(path)))
    files = list(files)
    if entry.languages:
        files = _in_folders(files, _as_list(entry.languages))
    for file in files:
        if file_type(file) not in FILE_TYPES:
            raise ValueError(f"{file}: unknown type; use one of {', '.join(FILE_TYPES)}, or these as .gz or .zst")

    if entry.name in taken:
        raise ValueError(f"another source is called `{entry.name}`; give each a different `name`")
    settings = {**defaults, **given}
    return Source(
        name=entry.name or _free_name(paths[0] if reader.name == COLUMNS else reader.name, taken),
        files=tuple(files),
        reader=reader.name,
        language=language,
        epochs=float(entry.epochs),
        weight=None if entry.weight is None else float(entry.weight),
        clean=settings.get("clean"),
        text_key=tuple(reader.text_key or _as_list(settings.get("text_key", "text"))),
        txt_sample_by=settings.get("txt_sample_by", "document"),
        txt_separator=entry.txt_separator if entry.txt_sample_by else settings.get("txt_separator"),
        minimums={key: float(least) for key, least in (entry.minimums or {}).items()},
    )


def _check_entry(given: dict[str, Any], reader: Reader) -> SourceEntry:
    """Return the entry.

    Raises:
        ValueError: The reader does not take a key, or a value is wrong.
    """
    common_keys = [key for key in USE if key not in SOME_READERS_ONLY]
    keys = [*common_keys, *reader.options, *reader.minimums]
    entry = SourceEntry()
    minimums: dict[str, Any] = {}
    for key, value in given.items():
        is_column_minimum = reader.name == COLUMNS and str(key).startswith("min_")
        if key not in keys and not is_column_minimum:
            raise ValueError(f"reader `{reader.name}` takes no key `{key}`; it takes: {', '.join(keys)}")
        # Assign the values one by one, so that an error can name its key. All thresholds are in one attribute.
        attribute, content = key, value
        if is_column_minimum or key in reader.minimums:
            minimums[reader.minimums.get(key, key.removeprefix("min_"))] = value
            attribute, content = "minimums", minimums
        try:
            setattr(entry, attribute, content)
        except StrictDataclassError as error:
            raise ValueError(f"{key} is `{value}`; use {USE[attribute]}") from error
    return entry


def _find_paths(entry: SourceEntry, reader: Reader) -> tuple[list[str], str | None]:
    """Return the paths of the entry, or those of the reader on the Hub, and their language if it is known."""
    if entry.path:
        # Files of the user may be in any language of the data set, so the language is certain if it has only one.
        only_language = list(reader.files)[0] if len(reader.files) == 1 else None
        return _as_list(entry.path), entry.language or only_language
    if not reader.hub:
        raise ValueError(f"reader `{reader.name}` is not on the Hub; set `path` to its files")
    language = entry.language or list(reader.files)[0]
    if language not in reader.files:
        known = ", ".join(reader.files)
        raise ValueError(f"reader `{reader.name}` has {known} on the Hub; for another language set `path`")
    return [f"hf://datasets/{reader.hub}/{reader.files[language]}"], language


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _free_name(path: str, taken: Collection[str]) -> str:
    """Return a name for a source: its file or, for a pattern, its folder. Add a number if the name is taken."""
    name = "text"
    for part in PurePosixPath(path).parts:
        stem = part.split(".")[0]
        if stem.strip("/") and not glob.has_magic(part):
            name = stem
    name = free = re.sub(r"[^\w-]+", "-", name)
    number = 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _in_folders(files: list[str], names: list[str]) -> list[str]:
    """Return the files in folders of these names. Raises ValueError for a name without files."""
    folders = {file: PurePosixPath(file).parent.name for file in files}
    for name in names:
        if name not in folders.values():
            raise ValueError(f"languages: no folder `{name}`; there are: {', '.join(sorted(set(folders.values())))}")
    return [file for file in files if folders[file] in names]
