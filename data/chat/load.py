"""Instruction and preference rows in their standard forms (see chat_rules.py) as memory-mapped data sets."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import find_files
from buddygpt.data.chat.exams import open_exams, refuse_exam_items
from buddygpt.data.chat.rules import FORMS, BadRow, check_row, special_tokens
from buddygpt.data.chat.tokens import find_faults, tokenise
from buddygpt.data.text.rows import read_rows

STAGES = {"sft": "sft", "preference": "dpo"}  # as data/doctor.py names them


def load_messages(files: list[str], **options: Any) -> Dataset:
    """Load instruction rows: columns `messages` and `tools` (None where a row has none), all other keys dropped.

    Args:
        files: Names or globs of jsonl or parquet files in the standard form. Read once, then mapped from the cache.
        options: `exams`, whose items no row may hold, and those of [`require_fit`], to refuse what data/doctor.py
            finds not fit.

    Raises:
        UserError: A missing, empty or malformed file, a row that is not in the standard form, with file and row; or
            the rows are not fit.
    """
    return _load(files, "sft", **options)


def load_preferences(files: list[str], **options: Any) -> Dataset:
    """Load preference rows: columns `prompt`, `chosen`, `rejected` and `tools`. Otherwise as [`load_messages`]."""
    return _load(files, "preference", **options)


def require_fit(
    dataset: Dataset,
    kind: str,
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    assistant_only: bool = True,
    force: bool = False,
) -> None:
    """Refuse rows of which nothing would be learnt, or that are all cut; the doctor's verdict, found by a few rows.

    Args:
        dataset: Rows that keep the rules.
        tokenizer: Of the model to train; with its chat template.
        max_length: Tokens that the trainer keeps of a row; None for all.
        assistant_only: Whether instructions carry loss on the assistant's words alone.
        force: Say so, and go on.

    Raises:
        UserError: The rows are not fit; with the command that shows why.
    """
    trained_on, uncut = False, max_length is None
    limit = f" --max_length {max_length}" if max_length else ""
    see = f"See: {_doctor(' '.join(files), kind)} --tokenizer {tokenizer.name_or_path}{limit}"
    for row in dataset:
        try:
            sequences = tokenise(row, kind, tokenizer, assistant_only)
        except BadRow as error:
            raise UserError(f"{', '.join(files)}: {error}. {see}") from error
        for ids, loss in sequences:
            trained_on = trained_on or any(loss[:max_length])
            uncut = uncut or len(ids) <= max_length
        if trained_on and uncut:
            return
    fault = f"{', '.join(files)}: not fit: {'; '.join(find_faults(0, trained_on, uncut, max_length))}. {see}"
    if not force:
        raise UserError(f"{fault}. Mend the rows, or give --train_on_unfit_data true")
    _warn(fault)


def _load(
    patterns: list[str],
    kind: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    exams: tuple[str, ...] = (),
    force: bool = False,
    **options: Any,
) -> Dataset:
    tokens = special_tokens(tokenizer) if tokenizer else ()
    flags = f" --tokenizer {shlex.quote(tokenizer.name_or_path)}" if tokenizer else ""
    flags += f" --exams {shlex.join(exams)}" if exams else ""
    parts = []
    for path in find_files(patterns):
        # The times of the last changes are part of the cache's key, so that after an edit all is looked at anew.
        # Tuples: datasets would deal a list out to several shards.
        version = tuple(file.stat().st_mtime_ns for file in (path, *find_files(list(exams))))
        rules = {"tokens": tokens, "exams": exams, "force": force, "flags": flags}
        source = {"path": path.absolute(), "kind": kind, "version": version, **rules}
        try:
            parts.append(Dataset.from_generator(_standard_rows, features=_features(kind), gen_kwargs=source))
        except DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
        if force:
            parts[-1] = _without_bad_rows(parts[-1], path, kind, flags)
    dataset = concatenate_datasets(parts).remove_columns("fault")
    if tokenizer:
        require_fit(dataset, kind, patterns, tokenizer, force=force, **options)
    return dataset


def _features(kind: str) -> Features:
    # One JSON text a message: an Arrow struct would give every message the keys of all others, filled with None.
    return Features({**{key: List(Json()) for key in (*FORMS[kind], "tools")}, "fault": Value("string")})


def _standard_rows(
    path: Path,
    kind: str,
    version: tuple[int, ...],
    tokens: tuple[str, ...],
    exams: tuple[str, ...],
    force: bool,
    flags: str,
) -> Iterator[dict]:
    row, items = None, open_exams(exams)
    for row in read_rows(path):
        content, fault = row.content, row.error
        try:
            if fault:
                raise BadRow(fault)
            check_row(content, kind, tokens)
            refuse_exam_items(content, kind, items)
        except BadRow as error:
            if not force:
                raise UserError(
                    f"{path}:{row.number}: {error}. See all bad rows: {_doctor(path, kind)}{flags}. Mend or convert "
                    f"the file: python data/convert_chat.py --kind {kind} --input {path} --output NEW.jsonl{flags}; "
                    "or leave bad rows out with --train_on_unfit_data true"
                ) from error
            content, fault = {}, f"{row.number}: {error}"
        yield {key: content.get(key) for key in (*FORMS[kind], "tools")} | {"fault": fault}
    if row is None:
        raise UserError(f"{path} is empty")


def _without_bad_rows(rows: Dataset, path: Path, kind: str, flags: str) -> Dataset:
    faults = rows["fault"][:]
    bad = [fault for fault in faults if fault]
    if len(bad) == len(faults):
        raise UserError(f"{path}: every row is bad, first {path}:{bad[0]}. See: {_doctor(path, kind)}{flags}")
    if bad:
        _warn(f"{path}: {len(bad):,} of {len(faults):,} rows are bad and left out, first {path}:{bad[0]}")
    return rows.select([number for number, fault in enumerate(faults) if not fault])


def _doctor(files: object, kind: str) -> str:
    return f"python data/doctor.py {files} --stage {STAGES[kind]}"


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every process loads the rows
        print(f"warning: {message}")
