"""Data, prompts and scores of the tasks about tool calls, for lm-eval's `custom_dataset` and `class`.

`sample_dir` of the metadata is a folder with `calls_test.jsonl`, as data/sample/make_tool_sample.py writes it: rows of
`prompt` (messages), `calls` (a list of name and arguments, empty if none is needed), `subject`, and `tools` if the
prompt lists them.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from buddygpt.data.chat.calls import TAGGED_CALL, read_call
from buddygpt.data.chat.rules import BadRow
from buddygpt.eval.benchmarks.rows import read_rows
from buddygpt.eval.harness import Task


class Calls(Task):
    """Right are the answers that make exactly the calls of the row, in any order; thoughts and other text are free."""

    def fewshot_context(self, doc, num_fewshot=0, *, apply_chat_template=False, chat_template=None, **_) -> str:
        if not apply_chat_template:
            raise ValueError("tool calls need a chat template: add the checkpoint to `chat`, or --apply_chat_template")
        return chat_template.__self__.tokenizer.apply_chat_template(  # lm-eval's own function knows no tools
            doc["prompt"],
            tools=json.loads(doc["tools"]),
            enable_thinking=doc["enable_thinking"],
            add_generation_prompt=True,
            tokenize=False,
        )

    def process_results(self, doc, results) -> dict[str, float]:
        return {"exact_match": float(find_calls(results[0]) == compare(json.loads(doc["calls"])))}


def find_calls(answer: str) -> list[str] | None:
    """Return the calls of an answer in a form that can be compared; None if one cannot be read."""
    text = answer.rpartition("</think>")[2]
    calls = TAGGED_CALL.findall(text)
    if len(calls) != text.count("<tool_call>"):
        return None
    try:
        return compare([json.loads(call) for call in calls])
    except (ValueError, RecursionError):
        return None


def compare(calls: list[Any]) -> list[str]:
    """Return each call as JSON with sorted keys, sorted. Raises BadRow if one lacks a name or arguments."""
    functions = [read_call(call)["function"] for call in calls]
    return sorted(json.dumps(function, sort_keys=True, ensure_ascii=False) for function in functions)


def with_thoughts(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Return the questions for a model that may think. Rows: prompt, tools and calls (JSON), subject."""
    return {"test": questions(sample_dir, enable_thinking=True)}


def without_thoughts(sample_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Return the questions for a model whose thinking is switched off."""
    return {"test": questions(sample_dir, enable_thinking=False)}


def questions(sample_dir: str | None, enable_thinking: bool) -> Dataset:
    if not sample_dir:
        raise ValueError("this task needs sample_dir, the folder of data/sample/make_tool_sample.py")
    path = Path(sample_dir) / "calls_test.jsonl"
    rows = []
    for number, row in enumerate(read_rows(path, "prompt", "subject"), start=1):
        calls = row.get("calls") or []
        try:
            compare(calls)
        except (BadRow, TypeError) as error:
            raise ValueError(
                f"{path}, row {number}: `calls` is not a list of objects with name and arguments"
            ) from error
        # As JSON, because a data set would give all calls the arguments of the others.
        texts = {"calls": json.dumps(calls), "tools": json.dumps(row.get("tools") or None)}
        rows.append({"prompt": row["prompt"], "subject": row["subject"], "enable_thinking": enable_thinking, **texts})
    return Dataset.from_list(rows)
