"""Load chat rows in the standard form (see rules.py) as memory-mapped data sets, if they are fit to train on."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, find_files
from buddygpt.data.chat.checker import RowChecker
from buddygpt.data.chat.rules import FORMS, BadRow, special_tokens
from buddygpt.data.chat.tokens import find_faults, tokenize
from buddygpt.data.text.benchmarks import BENCHMARK_TYPES
from buddygpt.data.text.rows import read_rows


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
    assistant_only: bool = True,
    benchmarks: Sequence[str] = (),
    force: bool = False,
    advise: Callable[..., str] = lambda *_: "",
) -> Dataset:
    """Load rows of one kind, and refuse what data/doctor.py would call not fit.

    The columns are those of the kind (`messages`; or `prompt`, `chosen`, `rejected`) and `tools`, None if a row has
    none. All other keys are dropped. Rows are read and checked once, then mapped from the cache of `datasets`.

    Args:
        files: Names or globs of jsonl or parquet files.
        kind: `sft` or `preference`.
        tokenizer: The tokenizer of the model to train, with its chat template. Without it the rules are checked, but
            not the loss.
        max_length: Tokens that the trainer keeps of a row; None for all.
        assistant_only: False: every token of an instruction carries loss.
        benchmarks: Files, globs or folders of benchmarks; a row that contains an item of one is bad.
        force: Leave bad rows out and print a warning instead of raising.
        advise: Called as `advise(files, kind, tokenizer, max_length, benchmarks)`; returns what to do about rows that
            are not fit, for the error.

    Raises:
        UserError: A file is missing, empty or malformed, a row is bad (with file and row), or all rows are.
    """
    tokens = special_tokens(tokenizer) if tokenizer else ()
    try:
        parts = [_load_file(path, kind, tokens, tuple(benchmarks), force) for path in find_files(files, ROW_TYPES)]
        rows = concatenate_datasets(parts)
        if tokenizer:
            _require_fit(rows, kind, files, tokenizer, max_length, assistant_only, force)
    except UnfitRows as error:
        raise UserError(f"{error}. {advise(error.files, kind, tokenizer, max_length, benchmarks)}") from error
    return rows


def _load_file(path: Path, kind: str, tokens: tuple[str, ...], benchmarks: tuple[str, ...], force: bool) -> Dataset:
    # The arguments are the key of the cache. The times of the last changes are among them, so an edit of the file or
    # of a benchmark causes a new check. They are tuples because `datasets` splits lists between processes.
    changed = tuple(file.stat().st_mtime_ns for file in (path, *find_files(list(benchmarks), BENCHMARK_TYPES)))
    source = {
        "path": path.absolute(),
        "kind": kind,
        "tokens": tokens,
        "benchmarks": benchmarks,
        "force": force,
        "changed": changed,
    }
    # A message is stored as one JSON text: an Arrow struct would give every message the keys of all others.
    columns = {key: List(Json()) for key in (*FORMS[kind], "tools")}
    try:
        rows = Dataset.from_generator(
            _generate_rows, features=Features({**columns, "fault": Value("string")}), gen_kwargs=source
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    if force:
        rows = _drop_bad_rows(rows, path)
    return rows.remove_columns("fault")


def _generate_rows(
    path: Path,
    kind: str,
    tokens: tuple[str, ...],
    benchmarks: tuple[str, ...],
    force: bool,
    changed: tuple[int, ...],
) -> Iterator[dict]:
    """Yield the rows of a file. A bad row raises [`UnfitRows`]; with `force` it becomes an empty one with a fault."""
    checker = RowChecker(kind, tokens, benchmarks)
    row = None
    for row in read_rows(path):
        fault = checker.check(row, schema=None).reason_to_refuse
        if fault and not force:
            raise UnfitRows(f"{path}:{row.number}: {fault}", [str(path)])
        content = {} if fault else row.content
        columns = {key: content.get(key) for key in (*FORMS[kind], "tools")}
        yield columns | {"fault": f"{row.number}: {fault}" if fault else None}
    if row is None:
        raise UserError(f"{path} is empty")


def _drop_bad_rows(rows: Dataset, path: Path) -> Dataset:
    faults = rows["fault"][:]
    bad = [fault for fault in faults if fault]
    if not bad:
        return rows
    if len(bad) == len(faults):
        raise UserError(f"{path}: every row is bad, first {path}:{bad[0]}. Fix or convert the file")
    _warn(f"{path}: {len(bad):,} of {len(faults):,} rows are bad and left out, first {path}:{bad[0]}")
    return rows.select([number for number, fault in enumerate(faults) if not fault])


def _require_fit(
    rows: Dataset,
    kind: str,
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    assistant_only: bool,
    force: bool,
) -> None:
    """Raise [`UnfitRows`] if no token carries loss, or if every row is cut. Stops at the rows that disprove both."""
    trained_on, uncut = False, max_length is None
    for row in rows:
        try:
            sequences = tokenize(row, kind, tokenizer, assistant_only)
        except BadRow as error:
            raise UnfitRows(f"{', '.join(files)}: {error}", files) from error
        for ids, loss in sequences:
            trained_on = trained_on or any(loss[:max_length])
            uncut = uncut or len(ids) <= max_length
        if trained_on and uncut:
            return
    fault = f"{', '.join(files)}: not fit: {'; '.join(find_faults(0, trained_on, uncut, max_length))}"
    if not force:
        raise UnfitRows(fault, files)
    _warn(fault)


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every process loads the rows
        print(f"warning: {message}")
