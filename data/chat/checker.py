"""The one check of chat rows. data/convert_chat.py, data/doctor.py and the recipes use it, so they always agree.

schema = find_schema(path)
checker = RowChecker(schema.kind)
for row in read_rows(path):
    checked = checker.check(row, schema)  # rows in standard form, or why the row is bad
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.loss_marks import check_marks, spread_marks
from buddygpt.data.chat.rules import (
    FORMS,
    RECIPES,
    BadRow,
    check_row,
    escape,
    refuse_label,
    refuse_media,
)
from buddygpt.data.chat.schemas import Schema, named_columns, recognize
from buddygpt.data.chat.thoughts import read_switch, split_by_questions
from buddygpt.data.chat.unread import STANDARD_KEYS, WatchedRow, unread_keys
from buddygpt.data.text.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from buddygpt.data.chat.tokens import TokenSequence
    from buddygpt.data.text.steps.decontaminate import BenchmarkIndex

ROWS_TO_RECOGNIZE = 100  # rows of a file that must agree on its schema
EMPTY_ROW = "the row is empty"


@dataclass
class CheckedRow:
    """One row of a file after the check: rows in standard form, or the fault of a bad row.

    `sequences` and `benchmark_items` have one entry per standard row, empty if the checker was not asked for them.
    """

    standard: list[dict[str, Any]] = field(default_factory=list)
    fault: str = ""
    escaped: int = 0  # texts that looked like special tokens
    unread: list[str] = field(default_factory=list)  # columns, and keys of turns, that were not read
    sequences: list[list["TokenSequence"]] = field(default_factory=list)
    benchmark_items: list[str] = field(default_factory=list)  # `BENCHMARK/FILE:ROW: BEGINNING`, or "" for none

    @property
    def reason_to_refuse(self) -> str:
        """The fault, or the benchmark file whose item the row contains; "" for a good row."""
        for item in self.benchmark_items:
            if item:
                return f"contains an item of {item.split(':')[0]}"
        return self.fault


class RowChecker:
    """Brings rows of one kind into the standard form and checks them.

    Args:
        kind: `sft`, `kto` or `preference`.
        special_tokens: Tokens to escape, or to refuse in rows without a schema, in addition to `SPECIAL_TOKEN`.
        benchmarks: Files, globs or folders of benchmarks whose items to look for in the rows.
        tokenizer: `check_all` also tokenizes the rows with it; the chat template may refuse some.

    Raises:
        UserError: A benchmark is missing or cannot be read.
    """

    def __init__(
        self,
        kind: str,
        special_tokens: tuple[str, ...] = (),
        benchmarks: Sequence[str] = (),
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ):
        self.kind = kind
        self.special_tokens = special_tokens
        self.index = open_benchmarks(benchmarks) if benchmarks else None
        self.tokenizer = tokenizer

    def check(self, row: Row, schema: Schema | None) -> CheckedRow:
        """Check one row of a file.

        Args:
            schema: The schema to convert it from. None: it must be in the standard form already.
        """
        if row.error:
            return CheckedRow(fault=row.error)
        checked = CheckedRow()
        try:
            # Conversion escapes special tokens; a row that is not converted must have none.
            if schema:
                standard, checked.escaped = convert(row.content, schema, self.special_tokens, checked.unread)
            else:
                check_row(row.content, self.kind, self.special_tokens)
                check_marks(row.content, self.kind)
                standard = [row.content]
                checked.unread = unread_keys(row.content, STANDARD_KEYS[self.kind])
        except BadRow as error:
            other = "" if schema else other_kind(row.content, self.kind)
            return CheckedRow(fault=f"{error}{other}")
        checked.standard = standard
        checked.sequences = [[] for _ in standard]
        checked.benchmark_items = [
            self.find_item(row_text(each, self.kind)) if self.index else "" for each in standard
        ]
        return checked

    def check_all(self, rows: list[Row], schema: Schema | None) -> list[CheckedRow]:
        """Check rows of one file, and tokenize them together, which is faster."""
        all_checked = [self.check(row, schema) for row in rows]
        if self.tokenizer:
            from buddygpt.data.chat.tokens import tokenize_rows  # imports torch, which conversion does not need

            # As load.py: a row with thoughts may be trained as several, whose sequences are listed one after another.
            split = split_by_questions if self.kind == "sft" else lambda row: [row]
            parts = [[split(each) for each in checked.standard] for checked in all_checked]
            standard = [each for of_rows in parts for of_row in of_rows for each in of_row]
            tokenized = iter(tokenize_rows(standard, self.kind, self.tokenizer))
            for number, (checked, of_rows) in enumerate(zip(all_checked, parts, strict=True)):
                sequences = [list(islice(tokenized, len(of_row))) for of_row in of_rows]
                if refused := [each for of_row in sequences for each in of_row if isinstance(each, BadRow)]:
                    all_checked[number] = CheckedRow(fault=str(refused[0]))
                elif sequences:
                    checked.sequences = [[*chain.from_iterable(each)] for each in sequences]
        return all_checked

    def find_item(self, text: str) -> str:
        """Return the first benchmark item that a text contains, or ""."""
        items = self.index.find(text) if self.index else []
        return items[0] if items else ""


def convert(
    row: dict[str, Any],
    schema: Schema,
    special_tokens: tuple[str, ...] = (),
    unread: list[str] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Return the standard rows that a row stands for, and how many special tokens were escaped in them.

    Args:
        unread: Receives the columns, and keys of turns, that the schema does not read.

    Raises:
        BadRow: The row does not have the keys or types of the schema, or breaks a rule.
    """
    if not row:
        raise BadRow(EMPTY_ROW)
    columns = named_columns(row)
    refuse_media(columns)
    if schema.kind == "sft":
        refuse_label(columns)
    watched = WatchedRow(spread_marks(columns))
    if missing := schema.keys - watched.keys():
        raise BadRow(f"no key {' and '.join(sorted(missing))}, unlike the schema {schema.name}")
    try:
        rows = schema.read(watched)
        switch = read_switch(watched)
    except BadRow:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRow(f"does not have the types of the schema {schema.name}") from error

    standard, escaped = [], 0
    for each in rows if isinstance(rows, list) else [rows]:
        each, count, as_json = escape(each | switch, special_tokens)
        check_row(each, schema.kind, special_tokens, as_json)
        check_marks(each, schema.kind)
        standard.append(each)
        escaped += count
    if unread is not None:
        unread += unread_keys(row, watched.read)
    return standard, escaped


def row_text(row: dict[str, Any], kind: str) -> str:
    """Return the texts of all turns of a standard row, one below the other."""
    return "\n".join(turn["content"] for key in FORMS[kind] for turn in row[key])


def open_benchmarks(benchmarks: Sequence[str]) -> "BenchmarkIndex":
    """Return an index of the items of benchmarks, in memory. Raises [`UserError`] as `build_index`."""
    from buddygpt.data.text.steps.decontaminate import build_index

    with TemporaryDirectory() as folder:  # the index keeps its files open after they are deleted
        return build_index(list(benchmarks), Path(folder))


# --- The schema of a file ---


class SchemaError(UserError):
    """The rows of a file do not agree on one schema. Naming the schema is a way out."""


def find_schema(path: Path | str, kind: str | None = None) -> Schema:
    """Return the schema of a file: the one that its first rows fit, ignoring rows that fit none.

    Args:
        kind: Only schemas of this kind.

    Raises:
        SchemaError: A row fits several schemas, or another one than the rows before; or no row fits any.
        UserError: The file has no readable row.
    """
    # Every row that fits a schema must fit the same one.
    first_row, unreadable, found = None, None, None
    for row in islice(read_rows(path), ROWS_TO_RECOGNIZE):
        if row.error or not row.content:
            unreadable = unreadable or row
            continue
        first_row = first_row or row
        matches = recognize(row.content, kind)
        if len(matches) > 1:
            names = ", ".join(entry.name for entry in matches)
            raise SchemaError(f"{path}:{row.number}: fits several schemas ({names}): {excerpt(row.content)}")
        if matches:
            found = found or matches[0]
            _require_same(path, row, found, matches)
    if found:
        return found

    # Say why there is none.
    if first_row and kind and (other := other_kind(first_row.content, kind)):
        raise UserError(f"{path}:{first_row.number}: fits no schema of kind {kind}{other}")
    if first_row:
        raise SchemaError(
            f"{path}:{first_row.number}: fits no schema{f' of kind {kind}' if kind else ''}; its columns: "
            f"{', '.join(first_row.content)}; {excerpt(first_row.content)}. Say which columns hold what with "
            "data/convert_chat.py --map prompt=question,completion=answer"
        )
    if unreadable:
        raise UserError(f"{path}:{unreadable.number}: {unreadable.error or EMPTY_ROW}")
    raise UserError(f"{path} is empty")


def other_kind(row: dict[str, Any], kind: str) -> str:
    """Return how to train on a row that only fits schemas of other kinds, to be added to an error; else ""."""
    matches = recognize(row)
    if not matches and row.get("prompt"):
        return f". The rows are prompts without answers to train on: {RECIPES['prompt']}"
    if not matches and is_plain_text(row):
        return f". The rows are plain text: {RECIPES['text']}"
    if not matches or matches[0].kind == kind or (recognize(row, kind) and matches[0].kind != "kto"):
        return ""
    other = matches[0]
    return f". The rows are of kind {other.kind} (schema {other.name}): {RECIPES[other.kind]}"


def is_plain_text(row: dict[str, Any]) -> bool:
    return any(isinstance(row.get(key), str) for key in ("text", "content"))


def require_schema(path: Path | str, row: Row, schema: Schema, kind: str | None = None) -> None:
    """Raise [`SchemaError`] if a later row of a file fits another schema than the rows before."""
    if not row.error:
        _require_same(path, row, schema, recognize(row.content, kind))


def _require_same(path: Path | str, row: Row, schema: Schema, matches: list[Schema]) -> None:
    if matches and schema not in matches:
        raise SchemaError(
            f"{path}:{row.number}: a row of schema {matches[0].name} after rows of {schema.name}: "
            f"{excerpt(row.content)}. Split the file"
        )


def excerpt(row: Any) -> str:
    """Return the beginning of a row as JSON, for an error of one line."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"
