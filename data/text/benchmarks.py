"""Read the questions of benchmarks: C-Eval, CMMLU, MMLU, GSM8K and other files of questions.

[`read_benchmarks`] accepts files of any of these forms, because decontamination looks for questions wherever they are.
[`read_multiple_choice`] is strict, because evaluation must not skip a question: it names the line that is wrong.
"""

import csv
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
QUESTION_KEYS = ("question", "problem", "prompt", "query", "q_main", "instruction", "content", "text", "问题", "题目")
CONTEXT_KEYS = ("body", "passage", "context", "article", "background", "材料", "背景", "文章", "短文")
SPLITS = ("test", "val", "valid", "dev", "train", "data")
OPTION_KEY = re.compile("(option_?|选项)?[a-h]")
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
    options in A, B, ..., in option_a, ..., in `options` or in `choices`. A .csv file without a header is read in
    MMLU's form: question, options, letter of the answer. A file in another form is skipped with a warning.

    Args:
        paths: A folder, file or glob for each benchmark.

    Raises:
        UserError: A benchmark does not exist or has no questions, or a row cannot be read.
    """
    for path, name in zip(paths, _name_benchmarks(paths), strict=True):
        has_questions = False
        for file in find_files([path], BENCHMARK_TYPES):
            count = 0
            for number, row in _read_rows(file):
                question = _find_text(row, QUESTION_KEYS)
                if question:
                    count += 1
                    place = f"{name}/{file.name}:{number}: {question[:40]}"
                    yield BenchmarkItem(place, question, _find_options(row), _find_text(row, CONTEXT_KEYS))
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
        yield row.number, {key.lower(): value for key, value in content.items()}


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line and columns of each row of a CSV file; nothing if it has no questions."""
    with _open_csv(file) as stream:
        reader = csv.reader(stream)
        rows: Iterator[list[str]] = reader
        first = next(reader, [])
        header = [cell.strip().lower() for cell in first]
        if not set(header) & set(QUESTION_KEYS):
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


def _find_text(row: dict[str, Any], keys: Sequence[str]) -> str:
    """Return the text in the first of these columns that has one, or an empty string."""
    for key in keys:
        if isinstance(row.get(key), str):
            return row[key].strip()
    return ""


def _find_options(row: dict[str, Any]) -> list[str]:
    """Return the options of a row: those in columns of their letters, then those in a list."""
    listed = row.get("options") or row.get("choices") or []
    if isinstance(listed, dict):  # {"text": [...], "label": [...]}, or {"A": ..., "B": ...}
        listed = listed.get("text") or list(listed.values())
    if isinstance(listed, str):
        listed = [listed]
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
