"""Load chat rows in the standard form (see rules.py) as memory-mapped data sets, if they are fit to train on."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, file_sha256, find_files
from buddygpt.data.chat.checker import RowChecker
from buddygpt.data.chat.report import format_unread
from buddygpt.data.chat.rules import FORMS, TEMPLATE_OPTIONS, BadRow, special_tokens
from buddygpt.data.chat.thoughts import PARTS, split_by_questions
from buddygpt.data.chat.tokens import TokenSequence, Truncation, find_faults, tokenize, training_template
from buddygpt.data.text.benchmarks import BENCHMARK_TYPES
from buddygpt.data.text.rows import read_rows

IGNORED = -100  # label of a token without loss
NOTES = ["place", "fault", "unread"]  # columns for messages
# Kind of row -> the columns that its trainer reads.
TOKEN_COLUMNS = {
    "sft": ("input_ids", "labels"),
    "kto": ("prompt_ids", "completion_ids"),
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
}


class UnfitRows(UserError):
    """Rows in `files` that data/doctor.py would call not fit."""

    def __init__(self, message: str, files: list[str]):
        super().__init__(message)
        self.files = files


def load_rows(
    files: list[str],
    kind: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    keep_end: bool = False,
    assistant_only: bool = True,
    loss_on: Sequence[str] = PARTS,
    benchmarks: Sequence[str] = (),
    force: bool = False,
    num_proc: int | None = None,
    advise: Callable[..., str] = lambda *_: "",
    key: Sequence[Any] = (),
) -> Dataset:
    """Load rows of one kind, and refuse what data/doctor.py would call not fit.

    The columns are those of the kind (see rules.py) and `tools`, None if a row has none; also `chat_template_kwargs`
    if a row has it. All other keys are dropped. Instructions with thoughts become several rows if needed (see
    thoughts.py). With a tokenizer there are also the columns of `TOKEN_COLUMNS`, and rows without an answer in what
    the trainer keeps are left out. Rows are read and checked once, then mapped from the cache of `datasets`.

    Args:
        files: Names or globs of jsonl or parquet files.
        kind: `sft`, `kto` or `preference`.
        tokenizer: The tokenizer of the model to train, with its chat template. Without it the rules are checked, but
            not the loss.
        max_length: Tokens that the trainer keeps of a row; None for all.
        keep_end: It keeps the last tokens, not the first.
        assistant_only: False: every token of an instruction carries loss.
        loss_on: The parts of the answers of an instruction that carry loss.
        benchmarks: Files, globs or folders of benchmarks; a row that contains an item of one is bad.
        force: Leave bad rows out and print a warning instead of raising.
        num_proc: Processes that tokenize.
        advise: Called as `advise(files, kind, tokenizer, max_length, benchmarks)`; returns what to do about rows that
            are not fit, for the error.
        key: What else later results that are cached with the rows depend on, such as the model that makes them.

    Raises:
        UserError: A file is missing, empty or malformed, a row is bad (with file and row), or all rows are.
    """
    tokens = special_tokens(tokenizer) if tokenizer else ()
    try:
        parts = [_load_file(path, kind, tokens, tuple(benchmarks), force) for path in find_files(files, ROW_TYPES)]
        rows = concatenate_datasets(parts)
        # Its own fingerprint depends on whether the parts were just made or read from the cache.
        key_of_parts = _cache_key([part._fingerprint for part in parts])
        rows = rows.select(range(len(rows)), new_fingerprint=key_of_parts)
        if tokenizer:
            rows = _tokenize_rows(rows, kind, tokenizer, assistant_only, tuple(loss_on), num_proc)
            rows = _drop_bad_rows(rows, files, force)
            rows = _drop_untrained_rows(rows, kind, files, Truncation(max_length, keep_end), force)
    except UnfitRows as error:
        raise UserError(f"{error}. {advise(error.files, kind, tokenizer, max_length, benchmarks)}") from error
    unused = [] if any(rows[TEMPLATE_OPTIONS][:]) else [TEMPLATE_OPTIONS]
    rows = rows.remove_columns([*NOTES, *unused])
    return rows.select(range(len(rows)), new_fingerprint=_cache_key(rows._fingerprint, *key)) if key else rows


# --- Read and check ---


def _load_file(path: Path, kind: str, tokens: tuple[str, ...], benchmarks: tuple[str, ...], force: bool) -> Dataset:
    contents = [file_sha256(file) for file in (path, *find_files(list(benchmarks), BENCHMARK_TYPES))]
    # The path is part of the key because it is part of the rows.
    key = _cache_key(str(path.absolute()), kind, tokens, benchmarks, contents)
    columns = _features_of(kind)
    try:
        rows = Dataset.from_generator(
            _generate_rows,
            features=Features({**columns, **dict.fromkeys(NOTES, Value("string"))}),
            gen_kwargs={"path": path, "kind": kind, "tokens": tokens, "benchmarks": benchmarks, "force": force},
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    unread = Counter(key for keys in rows["unread"][:] for key in keys.split(", ") if key)
    if unread:
        _print(f"{path}: not read: {format_unread(unread)}")
    return _drop_bad_rows(rows, [str(path)], force)


def _features_of(kind: str) -> dict[str, Any]:
    # A message is stored as one JSON text: an Arrow struct would give every message the keys of all others.
    columns = {key: List(Json()) for key in (*FORMS[kind], "tools")} | {TEMPLATE_OPTIONS: Json()}
    return columns | ({"label": Value("bool")} if kind == "kto" else {})


def _cache_key(*parts: Any) -> str:
    """Return a hash of what determines rows: `parts`, the code that reads and checks them, and library versions."""
    versions = (transformers.__version__, trl.__version__)
    return hashlib.sha256(json.dumps([parts, _hash_of_code(), versions]).encode()).hexdigest()[:32]


@cache
def _hash_of_code() -> str:
    files = [path for folder in ("chat", "text") for path in Path(__file__).parents[1].joinpath(folder).rglob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _generate_rows(
    path: Path, kind: str, tokens: tuple[str, ...], benchmarks: tuple[str, ...], force: bool
) -> Iterator[dict]:
    """Yield the rows of a file. A bad row raises [`UnfitRows`]; with `force` it becomes an empty one with a fault."""
    checker = RowChecker(kind, tokens, benchmarks)
    row = None
    for row in read_rows(path):
        checked = checker.check(row, schema=None)
        fault = checked.reason_to_refuse
        place = f"{path}:{row.number}"
        if fault and not force:
            raise UnfitRows(f"{place}: {fault}", [str(path)])
        content = {} if fault else row.content
        for part in split_by_questions(content) if kind == "sft" and content else [content]:
            columns = {key: part.get(key) for key in _features_of(kind)}
            yield columns | {"place": place, "fault": fault or None, "unread": ", ".join(checked.unread)}
    if row is None:
        raise UserError(f"{path} is empty")


def _drop_bad_rows(rows: Dataset, files: list[str], force: bool) -> Dataset:
    """Return the rows without a fault. Raises [`UnfitRows`] if one has a fault, unless `force`."""
    bad = [number for number, fault in enumerate(rows["fault"][:]) if fault]
    if not bad:
        return rows
    first = f"{rows[bad[0]]['place']}: {rows[bad[0]]['fault']}"
    if not force:
        raise UnfitRows(first, files)
    if len(bad) == len(rows):
        raise UserError(f"{', '.join(files)}: every row is bad, first {first}. Fix or convert the file")
    _warn(f"{', '.join(files)}: {len(bad):,} of {len(rows):,} rows are bad and left out, first {first}")
    return rows.select(sorted(set(range(len(rows))) - set(bad)))


# --- Tokenize ---


def _tokenize_rows(
    rows: Dataset,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool,
    loss_on: tuple[str, ...],
    num_proc: int | None,
) -> Dataset:
    """Add the columns of `TOKEN_COLUMNS`, or a fault to rows that the chat template refuses."""
    if kind == "sft" and assistant_only:
        training_template(tokenizer)  # raises UserError without one
    columns = {key: List(Value("int32")) for key in TOKEN_COLUMNS[kind]}
    return rows.map(
        _tokenize_row,
        fn_kwargs={"kind": kind, "tokenizer": tokenizer, "assistant_only": assistant_only, "loss_on": loss_on},
        features=Features({**rows.features, **columns}),
        num_proc=num_proc,
        new_fingerprint=_cache_key(
            rows._fingerprint,
            assistant_only,
            loss_on,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,  # templates write them
        ),
        desc="Tokenizing",
    )


def _tokenize_row(
    row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, assistant_only: bool, loss_on: tuple[str, ...]
) -> dict[str, Any]:
    try:
        sequences = tokenize(row, kind, tokenizer, assistant_only, loss_on)
    except BadRow as error:
        return {key: [] for key in TOKEN_COLUMNS[kind]} | {"fault": str(error)}
    if kind == "sft":
        ids, loss = sequences[0]
        return {"input_ids": ids, "labels": [id_ if each else IGNORED for id_, each in zip(ids, loss, strict=True)]}
    start = sequences[0].loss.count(0)
    tokens = [sequences[0].ids[:start], *(ids[start:] for ids, _ in sequences)]
    return dict(zip(TOKEN_COLUMNS[kind], tokens, strict=True))


def _drop_untrained_rows(rows: Dataset, kind: str, files: list[str], truncation: Truncation, force: bool) -> Dataset:
    """Return the rows that have an answer in what the trainer keeps, and print what `truncation` counts.

    Raises:
        UnfitRows: Too many rows have none, unless `force`; or all.
    """
    trained = []
    for number, row in enumerate(rows.select_columns(list(TOKEN_COLUMNS[kind]))):
        if kind == "sft":
            sequences = [TokenSequence(row["input_ids"], [label != IGNORED for label in row["labels"]])]
        else:
            prompt, *answers = (row[key] for key in TOKEN_COLUMNS[kind])
            sequences = [TokenSequence(prompt + ids, [0] * len(prompt) + [1] * len(ids)) for ids in answers]
        if truncation.add(sequences):
            trained.append(number)

    names = ", ".join(files)
    if faults := find_faults(0, truncation):
        if not (force and trained):
            raise UnfitRows(f"{names}: not fit: {'; '.join(faults)}", files)
        _warn(f"{names}: not fit: {'; '.join(faults)}")
    elif truncation.cut:
        _warn(f"{names}: {truncation}")
    if truncation.untrained:
        _warn(
            f"{names}: {truncation.untrained:,} of {truncation.rows:,} rows have no {truncation.missing} within "
            f"max_length {truncation.max_length:,} and are left out"
        )
        rows = rows.select(trained)
    return rows


def _warn(message: str) -> None:
    _print(f"warning: {message}")


def _print(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every process loads the rows
        print(message)
