"""Data and prompts of the tasks in this folder, read by lm-eval's `custom_dataset` and `class`.

lm-eval hands its `--metadata` to every function below, so a folder or file is named there: `sample_dir` (as
`data/sample/make_sample.py` writes it) and `heldout_text` (a jsonl with `text`). Relative paths are read from the
working directory. Nothing here imports the project, so that bare `lm_eval` can use it.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

OPTIONS = "ABCD"


class Dialogue(ConfigurableTask):
    """A task whose rows hold a conversation (`prompt`), rendered by the chat template or, without one, by `bare_text`.

    In multiple choice each answer is scored up to and including the end that closes it. Without its end the likelihood
    of "12" could never exceed that of "1", nor that of an answer said twice exceed that of the answer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc, num_fewshot=0, *, apply_chat_template=False, chat_template=None, **_) -> str:
        return chat_template(doc["prompt"]) if apply_chat_template else bare_text(doc["prompt"])

    def construct_requests(self, doc, ctx, *, apply_chat_template=False, **kwargs) -> list[Instance] | Instance:
        if self.OUTPUT_TYPE == "generate_until" and not apply_chat_template:
            ctx = ctx.rstrip(" ")  # a tokenizer joins the space with the word that the model is to say
        requests = super().construct_requests(doc, ctx, apply_chat_template=apply_chat_template, **kwargs)
        if self.OUTPUT_TYPE == "multiple_choice":
            end = "<|im_end|>" if apply_chat_template else "\n"
            for request in requests:
                request.arguments = (ctx, request.arguments[1] + end)
        return requests


def bare_text(messages: list[dict[str, str]]) -> str:
    """The conversation as questions and answers in running text, up to where the next answer begins."""
    chinese = re.search("[\u4e00-\u9fff]", messages[-1]["content"])
    marks = {"user": "问：", "assistant": "答："} if chinese else {"user": "Q: ", "assistant": "A: "}
    turns = [f"{marks.get(message['role'], '')}{message['content']}\n" for message in messages]
    return "".join(turns) + marks["assistant"]


def exam(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """The exam by split; rows: subject, question, A, B, C, D, prompt, choices (4 texts), label (0 to 3)."""
    folder = _named("sample_dir", sample_dir) / "exam"
    return {split: Dataset.from_list(_exam_rows(folder / split)) for split in ("dev", "val", "test")}


def questions(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Free-form questions; rows: prompt, answer, subject."""
    rows = _rows(_named("sample_dir", sample_dir) / "qa_test.jsonl", "question", "answer", "subject")
    kept = [{"prompt": _asked(row["question"]), "answer": row["answer"], "subject": row["subject"]} for row in rows]
    return {"test": Dataset.from_list(kept)}


def pairs(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Held-out preference pairs; rows: prompt (messages), choices (chosen, rejected), label (always 0), subject.

    A longer answer is less likely even to a model that knows nothing, so whether the rejected one is longer is kept as
    the subject: only where it is not, a coin gets half of them.
    """
    kept = []
    for row in _rows(_named("sample_dir", sample_dir) / "preference_eval.jsonl", "prompt", "chosen", "rejected"):
        chosen, rejected = (row[side][-1]["content"] for side in ("chosen", "rejected"))
        kept.append(
            {
                "prompt": [{key: message[key] for key in ("role", "content")} for message in row["prompt"]],
                "choices": [chosen, rejected],
                "label": 0,
                "subject": "rejected_longer" if len(rejected) > len(chosen) else "rejected_not_longer",
            }
        )
    return {"test": Dataset.from_list(kept)}


def heldout(heldout_text: str | None = None, **_) -> dict[str, Dataset]:
    """Held-out documents; rows: text."""
    rows = _rows(_named("heldout_text", heldout_text), "text")
    return {"test": Dataset.from_list([{"text": row["text"]} for row in rows])}


def _named(key: str, value: str | None) -> Path:
    if not value:
        raise ValueError(f"this task needs {key}: `--metadata {key}=PATH` for lm_eval, `--{key} PATH` for run_eval.py")
    return Path(value)


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _exam_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob("*.csv")):
        for number, row in enumerate(_rows(path, "question", *OPTIONS, "answer"), start=1):
            if row["answer"] not in OPTIONS:
                raise ValueError(f"{path}, row {number}: `answer` is {row['answer']!r}, not one of A, B, C, D")
            rows.append(
                {
                    "subject": path.stem,
                    **{key: row[key] for key in ("question", *OPTIONS)},
                    "prompt": _asked(row["question"]),
                    "choices": [row[key] for key in OPTIONS],
                    "label": OPTIONS.index(row["answer"]),
                }
            )
    if not rows:
        raise FileNotFoundError(f"{folder} has no SUBJECT.csv")
    return rows


def _rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Rows of a csv or jsonl file, each with something in every one of `columns`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file) if path.suffix == ".csv" else (json.loads(line) for line in file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not one JSON object per line: {error}") from error
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if not row.get(column):
                raise ValueError(f"{path}, row {number}: `{column}` is missing or empty")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
