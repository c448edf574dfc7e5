"""Read the questions of benchmarks: C-Eval, CMMLU, MMLU, GSM8K and other files of questions.

[`read_benchmarks`] accepts files of any of these forms, because decontamination looks for questions wherever they are.
[`read_multiple_choice`] is strict, because evaluation must not skip a question: it names the line that is wrong.
"""

import csv
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from buddygpt.cli.encoding import not_utf8
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, file_type, find_files
from buddygpt.data.text.lines import CsvLines
from buddygpt.data.text.rows import decompress, one_line, read_rows, skip_byte_order_mark

BENCHMARK_TYPES = (*ROW_TYPES, ".txt")
QUESTION_KEYS = ("question", "problem", "prompt", "query", "query_text", "q_main", "stem", "hypothesis", "sentence2")
QUESTION_KEYS += ("instruction", "goal", "sentence", "content", "text", "input", "问题", "题目", "题干")
CONTEXT_KEYS = ("body", "passage", "context", "context_text", "article", "paragraph", "story", "ctx", "premise")
CONTEXT_KEYS += ("sentence1", "support", "background", "content", "text", "input", "材料", "背景", "文章", "短文")
OPTION_LISTS = ("options", "choices", "choice", "endings", "candidates")
NESTED = ("data", "paragraphs", "qas", "questions")  # hold the questions of a row, or what holds them (SQuAD, RACE)
SPLITS = ("test", "val", "valid", "dev", "train", "data")
OPTION_KEY = re.compile("(option_?|选项)?[a-h]|(option|choice|ending|sol)_?[1-8]")
LETTERS = ("A", "B", "C", "D")


class BenchmarkItem(NamedTuple):
    """A question with its options."""

    place: str  # BENCHMARK/FILE:ROW: the first characters of the question
    question: str
    options: list[str]
    context: str = ""  # the passage that the question is about


def read_benchmarks(paths: list[str]) -> Iterator[BenchmarkItem]:
    """Yield the questions of benchmarks in .csv, .jsonl, .json, .parquet, or .txt files with a question per line.

    A row has its question in one of `QUESTION_KEYS`, the passage that it is about in one of `CONTEXT_KEYS`, and its
    options in A, B, ..., in option_a, ..., or in one of `OPTION_LISTS`. Several questions about one passage may be
    nested in its row. A .csv file without a header is read in MMLU's form: question, options, letter of the answer. A
    file in another form is skipped with a warning.

    Args:
        paths: A folder, file or glob for each benchmark.

    Raises:
        UserError: A benchmark does not exist or has no questions, or a row cannot be read.
    """
    for path, name in zip(paths, _name_benchmarks(paths), strict=True):
        has_questions = False
        for file in find_files([path], BENCHMARK_TYPES):
            count = 0
            for number, nested in _read_rows(file):
                for row in _flatten(nested):
                    key, question = _find_text(row, QUESTION_KEYS)
                    if question:
                        count += 1
                        place = f"{name}/{file.name}:{number}: {question[:40]}"
                        _, context = _find_text(row, [other for other in CONTEXT_KEYS if other != key])
                        yield BenchmarkItem(place, question, _find_options(row), context)
            if count:
                has_questions = True
            else:
                tqdm.write(f"skipped {file}: no questions found", file=sys.stderr)
        if not has_questions:
            raise UserError(f"{path}: no file has a column of questions; name it one of {', '.join(QUESTION_KEYS)}")


def _name_benchmarks(paths: list[str]) -> list[str]:
    """Name each benchmark after its file or folder, and also the folders above if names are equal or too general."""
    absolute = [Path(path).absolute() for path in paths]
    for parts in (1, 2, 3):
        names = []
        for path in absolute:
            words = [*path.parts[:-1], path.name.split(".")[0]]
            count = parts + 1 if words[-1] in SPLITS else parts  # `test` alone says too little
            names.append(re.sub(r"[^\w-]+", "_", "_".join(words[-count:])))
        if len(set(names)) == len(names):
            return names
    raise UserError(f"benchmarks are listed twice, or have equal names: {', '.join(paths)}")


def _read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and columns of each row, with lower-case names of columns."""
    if file_type(file) == ".csv":
        yield from _read_csv(file)
        return
    if rows := _read_lists(file):
        yield from enumerate(rows, start=1)
        return
    text_key = ["question"] if file_type(file) == ".txt" else None
    for row in read_rows(file, text_key, txt_sample_by="line"):
        is_text = not row.error.startswith("not valid UTF-8")
        if (
            row.error and row.number == 1 and is_text
        ):  # another kind of JSON file, such as settings that come with a benchmark
            return
        if row.error:
            raise UserError(f"{file}:{row.number}: {row.error}")
        content = row.content if isinstance(row.content, dict) else {"question": row.content}
        yield row.number, content


def _read_lists(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a .json file in the form of C3, [[sentences, questions, id], ...]; else an empty list."""
    if file_type(file) != ".json":
        return []
    try:
        with open(file, "rb") as raw, decompress(raw, file.suffix.lower()) as stream:
            if not re.match(rb"\s*\[\s*\[", stream.peek(64)):
                return []
            rows = json.load(stream)
        return [{"context": row[0], "questions": row[1]} for row in rows]
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, RecursionError, TypeError, LookupError):
        return []  # `read_rows` says what is wrong


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line and columns of each row of a CSV file; nothing if it has no questions."""
    with _open_csv(file) as stream:
        reader = csv.reader(stream)
        rows: Iterator[list[str]] = reader
        first = next(reader, [])
        header = [cell.strip().lower() for cell in first]
        letters = set(header) & set("abcdefgh")
        is_row = len(header) > 4 and letters == {header[-1]}  # MMLU's: an option may be called `input`
        if is_row or not set(header) & set(QUESTION_KEYS):
            # MMLU's files have no header: the first row ends with the letter of the answer.
            if not header or not re.fullmatch("[a-h]", header[-1]):
                return
            rows = chain([first], reader)
            header = ["question", *"abcdefgh"[: len(first) - 2], "answer"]
        for row in rows:
            stream.length = 0
            yield reader.line_num, dict(zip(header, row, strict=False))


@contextmanager
def _open_csv(file: Path) -> Iterator[CsvLines]:
    """Open a CSV file, plain, .gz or .zst. Whatever cannot be read in it is a [`UserError`]."""
    try:
        with open(file, "rb") as raw, decompress(raw, file.suffix.lower()) as stream:
            skip_byte_order_mark(stream)
            yield CsvLines(stream, errors="strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: {not_utf8(error.object)}") from error
    except (csv.Error, OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error


def _flatten(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each question of a row, with lower-case names of columns."""
    row = {key.lower(): value for key, value in row.items()}
    if isinstance(row.get("question"), dict):  # {"question": {"stem": ..., "choices": [...]}}
        row |= row.pop("question")
    for key in NESTED:
        items = row.get(key)
        if not isinstance(items, list) or not items:
            continue
        others = {name: value for name, value in row.items() if name != key}
        if all(isinstance(item, dict) for item in items):
            for item in items:
                yield from _flatten(others | item)
            return
        options = row.get("options")
        if key == "questions" and isinstance(options, list) and len(options) == len(items):  # RACE as published
            for question, choices in zip(items, options, strict=True):
                yield others | {"question": question, "options": choices}
            return
    yield row


def _find_text(row: dict[str, Any], keys: Sequence[str]) -> tuple[str, str]:
    """Return the first of these columns that has a text, or a list of texts, and the text; else empty strings."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if isinstance(value, str) and value.strip():
            return key, value.strip()
    return "", ""


def _find_options(row: dict[str, Any]) -> list[str]:
    """Return the options of a row: those in columns of their letters, then those in a list."""
    listed = next((row[key] for key in OPTION_LISTS if row.get(key)), [])
    if isinstance(listed, dict):  # {"text": [...], "label": [...]}, or {"A": ..., "B": ...}
        listed = listed.get("text") or list(listed.values())
    if not isinstance(listed, list):
        listed = [listed]
    listed = [option.get("text") if isinstance(option, dict) else option for option in listed]
    named = [row[key] for key in sorted(row) if OPTION_KEY.fullmatch(key)]
    return [str(option) for option in [*named, *listed] if option is not None]


def read_multiple_choice(
    file: Path, question: str = "question", answer: str = "answer", has_header: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line and columns of each question of a CSV file, and accept no gap.

    Args:
        file: A .csv file with the columns `question`, A, B, C, D and `answer`. Other columns are ignored.
        question: Name of the column with the question.
        answer: Name of the column with the letter of the right option.
        has_header: The first line names the columns. Without it, as in MMLU, there are these six in this order.

    Raises:
        UserError: The file cannot be read, a column is missing, there are no rows, a cell is empty, or an answer is
            not one of A, B, C, D.
    """
    columns = (question, *LETTERS, answer)
    with _open_csv(file) as stream:
        rows = csv.DictReader(stream, fieldnames=None if has_header else columns)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{file}: no column {', '.join(missing)}.")
        for row in rows:
            stream.length = 0
            if not all(row[column] for column in columns):
                raise UserError(f"{file}, line {rows.line_num}: a question, option or answer is empty.")
            if row[answer] not in LETTERS:
                raise UserError(f"{file}, line {rows.line_num}: the answer is `{row[answer]}`, not A, B, C or D.")
            yield rows.line_num, row
        if rows.line_num < 1 + has_header:
            raise UserError(f"{file} has no rows.")
