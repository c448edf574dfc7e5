"""The tool sample: rows are fit to train on, and evaluation has no calculation and no wording of training."""

import json

import pytest
from tiny_tokenizer import run

from buddygpt.data.chat.rules import check_row
from buddygpt.data.sample import make_sample, make_tool_sample


@pytest.mark.slow
def test_the_tool_sample_can_be_trained_and_holds_out_its_questions(tmp_path, monkeypatch):
    run(make_sample, monkeypatch, "--output", tmp_path / "sample")
    arguments = ("--sample", tmp_path / "sample", "--train_rows", 600, "--test_rows", 200)
    run(make_tool_sample, monkeypatch, *arguments, "--output", tmp_path / "a")
    run(make_tool_sample, monkeypatch, *arguments, "--output", tmp_path / "b")
    run(make_tool_sample, monkeypatch, *arguments, "--output", tmp_path / "listed", "--list_tools", "true")
    rows = {}
    for name in ("sft_train", "sft_eval", "calls_train", "calls_test"):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert (tmp_path / "b" / f"{name}.jsonl").read_text(encoding="utf-8") == text
        rows[name] = [json.loads(line) for line in text.splitlines()]
        listed = (tmp_path / "listed" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line)["tools"] for line in listed)
    assert len(rows["sft_train"]) == len(rows["calls_train"]) == 600 and len(rows["calls_test"]) == 200
    for row in rows["sft_train"] + rows["sft_eval"]:
        check_row(row, "sft")
        thinks = any("<think>" in turn["content"] for turn in row["messages"])
        assert thinks == (row.get("chat_template_kwargs") != {"enable_thinking": False})

    for row, chat in zip(rows["calls_train"], rows["sft_train"], strict=True):
        assert row["prompt"] == chat["messages"][:1]
        calls = [call["function"] for call in chat["messages"][1].get("tool_calls", [])]
        assert row["answer"] == calls or chat["messages"][-1]["content"].endswith(row["answer"])

    trained = {row["messages"][0]["content"] for row in rows["sft_train"]}
    calls = {
        json.dumps(call["function"])
        for row in rows["sft_train"]
        for turn in row["messages"]
        for call in turn.get("tool_calls", [])
        if call["function"]["name"] == "calculator"
    }
    assert {row["subject"] for row in rows["calls_test"]} == {"calculator", "lookup", "parallel", "fact"}
    for row in rows["calls_test"]:
        assert row["prompt"][0]["content"] not in trained
        assert not calls & {json.dumps(call) for call in row["calls"]}
        assert len(row["calls"]) == {"parallel": 2, "fact": 0}.get(row["subject"], 1)
