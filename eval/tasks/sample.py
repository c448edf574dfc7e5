"""Data and prompts of the tasks in this folder, for lm-eval's `custom_dataset` and `class`.

lm-eval passes its `--metadata` to every function below: `sample_dir` is a folder written by
`data/sample/make_sample.py`, and `heldout_text` is a jsonl file with `text`. Relative paths start at the working
directory. Bare `lm_eval` can use this file, too.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance

from buddygpt.data.text.benchmarks import LETTERS, read_multiple_choice
from buddygpt.eval.benchmarks.rows import read_rows
from buddygpt.eval.harness import Task


class Dialogue(Task):
    """A task whose rows hold a conversation in `prompt`, rendered by the chat template or by `bare_text`.

    In multiple choice, the likelihood of an answer includes the mark that ends it. Without it, "12" could never be
    more likely than "1", nor an answer repeated twice more likely than the answer once.
    """

    def fewshot_context(self, doc, num_fewshot=0, *, apply_chat_template=False, chat_template=None, **_) -> str:
        if apply_chat_template:
            return chat_template(doc["prompt"])
        return bare_text(doc["prompt"])

    def construct_requests(self, doc, ctx, *, apply_chat_template=False, **kwargs) -> list[Instance] | Instance:
        # Tokenizers join a space or a mark with the word after it, so a prompt for generation must not end in one.
        # sample_qa.yaml removes the mark from the answer.
        if self.OUTPUT_TYPE == "generate_until" and not apply_chat_template:
            ctx = ctx.rstrip(" ：")
        requests = super().construct_requests(doc, ctx, apply_chat_template=apply_chat_template, **kwargs)
        if self.OUTPUT_TYPE == "multiple_choice":
            end = "<|im_end|>" if apply_chat_template else "\n"
            for request in requests:
                _, answer = request.arguments
                request.arguments = (ctx, answer + end)
        return requests


def bare_text(messages: list[dict[str, str]]) -> str:
    """Return a conversation as plain questions and answers, ending where the next answer begins."""
    is_chinese = re.search("[\u4e00-\u9fff]", messages[-1]["content"])
    marks = {"user": "问：", "assistant": "答："} if is_chinese else {"user": "Q: ", "assistant": "A: "}
    text = ""
    for message in messages:
        mark = marks.get(message["role"], "")  # a system message has none
        text += f"{mark}{message['content']}\n"
    return text + marks["assistant"]


def exam(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Return the multiple-choice questions of each split: dev, val and test.

    Rows: subject, question, A, B, C, D, prompt (messages), choices (4 texts), label (0 to 3).
    """
    folder = required_path("sample_dir", sample_dir) / "exam"
    return {split: Dataset.from_list(read_exam(folder / split)) for split in ("dev", "val", "test")}


def questions(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Return the free-form questions. Rows: prompt (messages), answer, subject."""
    path = required_path("sample_dir", sample_dir) / "qa_test.jsonl"
    rows = []
    for row in read_rows(path, "question", "answer", "subject"):
        rows.append({"prompt": as_messages(row["question"]), "answer": row["answer"], "subject": row["subject"]})
    return {"test": Dataset.from_list(rows)}


def pairs(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Return the held-out preference pairs. Rows: prompt (messages), choices (chosen, rejected), label (0), subject.

    The subject tells pairs apart by length: longer answers are less likely even to an untrained model, so the chance
    level is 50% only if the rejected answer is not longer than the chosen one.
    """
    path = required_path("sample_dir", sample_dir) / "preference_eval.jsonl"
    rows = []
    for row in read_rows(path, "prompt", "chosen", "rejected"):
        chosen = row["chosen"][-1]["content"]
        rejected = row["rejected"][-1]["content"]
        rows.append(
            {
                "prompt": [{"role": message["role"], "content": message["content"]} for message in row["prompt"]],
                "choices": [chosen, rejected],
                "label": 0,
                "subject": "rejected_longer" if len(rejected) > len(chosen) else "rejected_not_longer",
            }
        )
    return {"test": Dataset.from_list(rows)}


def heldout(heldout_text: str | None = None, **_) -> dict[str, Dataset]:
    """Return the held-out documents. Rows: text."""
    rows = read_rows(required_path("heldout_text", heldout_text), "text")
    return {"test": Dataset.from_list([{"text": row["text"]} for row in rows])}


def required_path(key: str, value: str | None) -> Path:
    """Return the path that the metadata gives for `key`; ValueError if there is none."""
    if not value:
        raise ValueError(f"this task needs {key}: `--metadata {key}=PATH` for lm_eval, `--{key} PATH` for run_eval.py")
    return Path(value)


def as_messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def read_exam(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of all SUBJECT.csv files in a folder; FileNotFoundError if there are none."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        for _, row in read_multiple_choice(path):
            options = {letter: row[letter] for letter in LETTERS}
            rows.append(
                {
                    "subject": path.stem,
                    "question": row["question"],
                    **options,
                    "prompt": as_messages(row["question"]),
                    "choices": list(options.values()),
                    "label": LETTERS.index(row["answer"]),
                }
            )
    if not rows:
        raise FileNotFoundError(f"{folder} has no SUBJECT.csv")
    return rows
