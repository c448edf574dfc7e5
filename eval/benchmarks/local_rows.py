"""Read local files of benchmarks in their original formats, as the rows that lm-eval's tasks expect from the Hub.

`eval/local_exams.py` writes task files whose data [`load`] returns. Nothing is skipped: a row without one of the
columns below is a UserError with its file and line.
"""

import base64
import hashlib
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

import buddygpt.eval.harness  # noqa: F401  makes lm-eval score every answer from its first token
from buddygpt.cli.errors import UserError
from buddygpt.data.text.benchmarks import LETTERS, read_multiple_choice
from buddygpt.data.text.rows import read_rows

Rows = list[dict[str, Any]]
XSTORYCLOZE = ("story_id", *(f"input_sentence_{n}" for n in range(1, 5)), "sentence_quiz1", "sentence_quiz2")


def load(reader: str, files: Mapping[str, str | list[str]], **_: Any) -> dict[str, Dataset]:
    """Return the rows of each split, for lm-eval's `custom_dataset`.

    Args:
        reader: A key of `READERS`.
        files: A file, or several, for each split.

    Raises:
        UserError: A file cannot be read, or has no rows or a bad one.
    """
    return {split: Dataset.from_list(read_files(reader, names)) for split, names in files.items()}


def read_files(reader: str, names: str | list[str]) -> Rows:
    """Return the rows of one file or several; see [`load`]."""
    rows = []
    for name in [names] if isinstance(names, str) else names:
        of_file = READERS[reader](Path(name))
        if not of_file:
            raise UserError(f"{name} has no rows.")
        rows += of_file
    return rows


def columns_of(file: Path, *columns: str, optional: tuple[str, ...] = ()) -> Rows:
    """Return some columns of a .jsonl, .json, .parquet or .csv file. Upper and lower case are the same.

    Raises:
        UserError: A row lacks one of `columns`, or it is empty.
    """
    rows = []
    for row in read_rows(file):
        if row.error:
            raise UserError(f"{file}:{row.number}: {row.error}")
        found = {key.lower(): value for key, value in row.content.items()}
        for column in columns:
            if found.get(column.lower()) in (None, "", []):
                raise UserError(f"{file}:{row.number}: `{column}` is missing or empty; there are: {', '.join(found)}")
        present = [*columns, *(column for column in optional if column.lower() in found)]
        rows.append({column: found[column.lower()] for column in present})
    return rows


def exam(question: str, answer: str) -> Callable[[Path], Rows]:
    """Return a reader of .csv files with a header: the columns `question`, A, B, C, D and `answer`, a letter."""

    def read(file: Path) -> Rows:
        columns = (question, *LETTERS, answer)
        return [{key: row[key] for key in columns} for _, row in read_multiple_choice(file, question, answer)]

    return read


def mmlu(file: Path) -> Rows:
    """Read a .csv file without header: question, four options, letter."""
    return [
        {
            "question": row["question"],
            "choices": [row[letter] for letter in LETTERS],
            "answer": LETTERS.index(row["answer"]),
        }
        for _, row in read_multiple_choice(file, has_header=False)
    ]


def arc(file: Path) -> Rows:
    """Read the release of AI2: `question` holds `stem` and `choices`; `answerKey`."""
    rows = []
    for number, row in enumerate(columns_of(file, "question", "answerKey"), start=1):
        question, key = row["question"], row["answerKey"]
        try:
            labels = [choice["label"] for choice in question["choices"]]
            texts = [choice["text"] for choice in question["choices"]]
            labels.index(key)
            rows.append({"question": question["stem"], "choices": {"text": texts, "label": labels}, "answerKey": key})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}, row {number}: `question` is not {{stem, choices: [{{text, label}}]}} with `answerKey` "
                "among the labels"
            ) from error
    return rows


def arc_zh(file: Path) -> Rows:
    """Read Okapi's translation: instruction, option_a to option_d, sometimes option_e, and the answer's letter."""
    options = [f"option_{letter}" for letter in "abcde"]
    rows = columns_of(file, "instruction", *options[:3], "answer", optional=("id", *options[3:]))
    for number, row in enumerate(rows, start=1):
        given = [option for option in options if row.setdefault(option, None)]
        if f"option_{str(row['answer']).lower()}" not in given:
            raise UserError(f"{file}, row {number}: the answer is `{row['answer']}`, and there is no such option.")
    return [{"id": str(number)} | row for number, row in enumerate(rows)]


def ifeval(file: Path) -> Rows:
    """Read key, prompt, instruction_id_list and kwargs. All objects in kwargs get the same keys, as on the Hub."""
    rows = columns_of(file, "key", "prompt", "instruction_id_list", "kwargs")
    keys = sorted({key for row in rows for arguments in row["kwargs"] for key in arguments or {}})
    for number, row in enumerate(rows, start=1):
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise UserError(f"{file}, row {number}: `kwargs` needs an object for each of `instruction_id_list`.")
        row["kwargs"] = [{key: (arguments or {}).get(key) for key in keys} for arguments in row["kwargs"]]
    return rows


def piqa(file: Path) -> Rows:
    """Read goal, sol1 and sol2; the labels are the lines of valid-labels.lst next to valid.jsonl."""
    rows = columns_of(file, "goal", "sol1", "sol2", optional=("label",))
    if "label" not in rows[0]:
        path = file.with_name(f"{file.name.split('.')[0]}-labels.lst")
        if not path.is_file():
            raise UserError(f"piqa: {path} does not exist; it holds a 0 or 1 for each row of {file.name}.")
        labels = path.read_text(encoding="utf-8").split()
        if len(labels) != len(rows) or not set(labels) <= {"0", "1"}:
            raise UserError(f"piqa: {path} is not a 0 or 1 for each of the {len(rows)} rows of {file.name}.")
        rows = [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]
    return rows


def hellaswag(file: Path) -> Rows:
    """Read activity_label, ctx_a, ctx_b, endings and label of the release on GitHub."""
    rows = columns_of(file, "activity_label", "ctx_a", "endings", "label", optional=("ctx_b",))
    return [row | {"ctx_b": row.get("ctx_b") or "", "label": str(row["label"])} for row in rows]


def xstorycloze(file: Path) -> Rows:
    """Read a table separated by tabs with a header: id, four sentences, two endings, and 1 or 2 for the right one."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8: {error}") from error
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 8 or cells[-1] not in ("1", "2"):
            raise UserError(f"{file}:{number}: not eight cells separated by tabs, the last of them 1 or 2.")
        rows.append(dict(zip(XSTORYCLOZE, cells, strict=False)) | {"answer_right_ending": int(cells[-1])})
    return rows


def livecodebench(file: Path) -> Rows:
    """Read problems of code generation. Rows: question_id, question, starter_code, function, difficulty, tests.

    Tests are `public_test_cases` and `private_test_cases`, JSON lists of {input, output}, which may be compressed. A
    problem with a `func_name` in its `metadata` is tested by calls, any other by its input and output.
    """
    optional = ("question_id", "starter_code", "private_test_cases", "metadata", "difficulty")
    rows = []
    for number, row in enumerate(
        columns_of(file, "question_content", "public_test_cases", optional=optional), start=1
    ):
        try:
            cases = [case for key in ("public", "private") for case in _read_cases(row.get(f"{key}_test_cases"))]
            tests = [{"input": case["input"], "output": case["output"]} for case in cases]
            metadata = row.get("metadata") or {}
            metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
            function = metadata.get("func_name") or ""
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            EOFError,
            zlib.error,
            pickle.UnpicklingError,
        ) as error:
            raise UserError(f"{file}, row {number}: its test cases cannot be read: {error}") from error
        if not tests:
            raise UserError(f"{file}, row {number}: it has no test cases.")
        rows.append(
            {
                "question_id": str(row.get("question_id") or number),
                "question": row["question_content"],
                "starter_code": row.get("starter_code") or "",
                "function": function,
                "difficulty": str(row.get("difficulty") or ""),
                "tests": tests,
            }
        )
    return rows


def _read_cases(cases: Any) -> list[dict[str, str]]:
    if not cases or isinstance(cases, list):
        return cases or []
    try:
        return json.loads(cases)
    except ValueError:
        packed = zlib.decompress(base64.b64decode(cases))
        return json.loads(TextUnpickler(io.BytesIO(packed)).load())


class TextUnpickler(pickle.Unpickler):
    """Reads the pickled text of `private_test_cases`. Other objects could run code while they are read."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"they hold {module_name}.{global_name}, not text")


def livecodebench_output(file: Path) -> Rows:
    """Read problems of output prediction: the output of a call is asked for. `test` is a JSON list with one test."""
    rows = []
    for number, row in enumerate(columns_of(file, "question_content", "starter_code", "test"), start=1):
        try:
            test = json.loads(row["test"])[0] if isinstance(row["test"], str) else row["test"][0]
            json.loads(test["output"])
            (name,) = re.findall(r"^\s*def (\w+)", row["starter_code"], re.MULTILINE)
            call = f"{name}({', '.join(test['input'].split(chr(10)))})"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}, row {number}: `test` is not a JSON list of {{input, output}}, or `starter_code` not one "
                f"function: {error}"
            ) from error
        texts = {"question": row["question_content"], "starter_code": row["starter_code"]}
        rows.append(texts | {"call": call, "output": test["output"]})
    return rows


def columns(*names: str, optional: tuple[str, ...] = ()) -> Callable[[Path], Rows]:
    """Return a reader that takes these columns as they are."""
    return lambda file: columns_of(file, *names, optional=optional)


def shuffle_options(dataset: Dataset) -> Dataset:
    """Put GPQA's options in an order that depends on the question alone, as `process_docs` of lm-eval's tasks.

    lm-eval shuffles with the global generator each time it reads the rows. Those of a local file are not cached, so it
    would grade the answers by another order than the one it asked for.
    """

    def clean(text: str) -> str:  # as lm-eval
        return text.strip().replace(" [title]", ". ").replace("  ", " ")

    def shuffle(row: dict[str, Any]) -> dict[str, str]:
        right = clean(row["Correct Answer"])
        options = [right, *(clean(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3))]
        seed = hashlib.sha256(row["Question"].encode()).digest()
        random.Random(seed).shuffle(options)
        named = {f"choice{number}": option for number, option in enumerate(options, start=1)}
        return named | {"answer": f"({LETTERS[options.index(right)]})"}

    return dataset.map(shuffle)


READERS: dict[str, Callable[[Path], Rows]] = {
    "cmmlu": exam("Question", "Answer"),
    "ceval": exam("question", "answer"),
    "mmlu": mmlu,
    "arc": arc,
    "arc_zh": arc_zh,
    "gpqa": columns("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))),
    "ifeval": ifeval,
    "aime": columns("Problem", "Answer"),
    "math": columns("problem", "solution", "answer", optional=("subject", "level")),
    "gsm8k": columns("question", "answer"),
    "piqa": piqa,
    "hellaswag": hellaswag,
    "xstorycloze": xstorycloze,
    "pairs": columns("sentence_good", "sentence_bad"),
    "text": columns("text"),
    "livecodebench": livecodebench,
    "livecodebench_output": livecodebench_output,
}
