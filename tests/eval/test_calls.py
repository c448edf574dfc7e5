"""Which calls of an answer count as right, and what the task renders."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("calls", ROOT / "eval" / "tasks" / "calls.py")
calls = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calls)
RIGHT = [{"name": "f", "arguments": {"a": 1, "b": [1, 2]}}, {"name": "g", "arguments": {}}]


def write(*texts: str) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


F, G = '{"name": "f", "arguments": {"b": [1, 2], "a": 1}}', '{"name": "g", "arguments": {}}'


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        (write(F, G), RIGHT, 1),
        (write(G, F), RIGHT, 1),
        ("<think>\n" + write(G) + "\n</think>\n\ntext\n" + write(F, G), RIGHT, 1),
        (write(F), RIGHT, 0),
        (write(F, G, G), RIGHT, 0),
        (write(F.replace("1", "2"), G), RIGHT, 0),
        (write(F.replace("[1, 2]", "[2, 1]"), G), RIGHT, 0),
        (write(F, G) + "\n<tool_call>\n{", RIGHT, 0),
        (write(F, '{"name": "g"}'), RIGHT, 0),
        (write(F, "[1]"), RIGHT, 0),
        (write(F, "{"), RIGHT, 0),
        ("", RIGHT, 0),
        ("巴黎", [], 1),
        (write(G), [], 0),
        ("<tool_call>\n{", [], 0),
    ],
)
def test_exactly_the_needed_calls_are_right(answer, expected, score):
    task = calls.Calls.__new__(calls.Calls)
    assert task.process_results({"calls": json.dumps(expected)}, [answer]) == {"exact_match": score}


def test_a_question_is_rendered_with_its_tools_and_its_switch(tmp_path):
    row = {"prompt": [{"role": "user", "content": "q"}], "calls": RIGHT, "subject": "s", "tools": [{"name": "f"}]}
    (tmp_path / "calls_test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"calls": []}))
    seen = []
    tokenizer = SimpleNamespace(apply_chat_template=lambda prompt, **options: seen.append((prompt, options)))
    model = type("Model", (), {"tokenizer": tokenizer, "render": lambda self: None})()
    task = calls.Calls.__new__(calls.Calls)
    for load, thinks in ((calls.with_thoughts, True), (calls.without_thoughts, False)):
        doc = load(str(tmp_path))["test"][0]
        task.fewshot_context(doc, apply_chat_template=True, chat_template=model.render)
        prompt, options = seen.pop()
        assert prompt == row["prompt"] and options["tools"] == row["tools"] and options["enable_thinking"] is thinks
    with pytest.raises(ValueError, match="tool calls need a chat template"):
        task.fewshot_context(doc)


@pytest.mark.parametrize("bad", [[{"name": "f"}], ["f"], [1]])
def test_rows_without_readable_calls_are_refused(tmp_path, bad):
    row = {"prompt": [{"role": "user", "content": "q"}], "calls": bad, "subject": "s"}
    (tmp_path / "calls_test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="calls_test.jsonl, row 1: `calls` is not a list"):
        calls.with_thoughts(str(tmp_path))
