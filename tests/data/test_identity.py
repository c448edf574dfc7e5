"""Rows that teach a model who it is: bilingual, with held-out wordings, other models denied, ordinary rows kept."""

import json

import pytest
from conftest import run

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.load import load_rows

NAMES = ["--name", "小明", "--name_en", "Ming", "--author", "李雷", "--author_en", "Li Lei"]


def write(folder, *arguments):
    run("data/identity.py", *NAMES, "--output", folder, *arguments)
    files = ("train.jsonl", "eval.jsonl", "qa_test.jsonl")
    return [[json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()] for file in files]


def last_exchange(row):
    return tuple(turn["content"] for turn in row["messages"][-2:])


def test_rows_about_the_identity(tmp_path):
    train, heldout, questions = write(tmp_path, "--mix_ratio", 0)
    asked = dict(map(last_exchange, train))
    assert asked["你是谁？"] == "我是小明，由李雷训练的语言模型。"
    assert asked["Who trained you?"] == "I was trained by Li Lei, and my name is Ming."
    assert {answer.split("，")[0] for question, answer in asked.items() if "ChatGPT" in question} == {
        "不是",
        "No, I am Ming, a language model trained by Li Lei.",
    }
    assert asked["Are you Ming?"].startswith("Yes, ") and asked["你是小明吗？"].startswith("是的，")
    assert asked["Hello, who are you?"] == asked["Who are you?"]
    text = json.dumps([train, heldout], ensure_ascii=False)
    assert "{" not in text.replace('{"', "") and len(asked) > 500

    assert not set(asked) & {row["question"] for row in questions}
    assert [last_exchange(row) for row in heldout] == [(row["question"], row["answer"]) for row in questions]
    assert {row["subject"] for row in questions} == {
        f"{language}_{intent}" for language in ("zh", "en") for intent in ("name", "author", "other", "same")
    }
    load_rows([str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")], "sft")  # raises if a row is bad


def test_a_model_is_not_told_to_deny_itself(tmp_path):
    run("data/identity.py", "--name", "Qwen", "--author", "Us", "--output", tmp_path, "--mix_ratio", 0)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = dict(map(last_exchange, rows))
    assert asked["Are you Qwen?"].startswith("Yes") and asked["你是Qwen吗？"].startswith("是的")


def test_ordinary_rows_are_mixed_in_without_other_introductions(tmp_path, capsys):
    pairs = [
        ("你叫什么？", "我是小布。"),
        ("Who?", "I am Buddy."),
        ("Who?", "I'm Buddy."),
        ("1+1?", "2"),
        ("二加二？", "四"),
    ]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in pairs
    ]
    (tmp_path / "sft.jsonl").write_text("\n".join(lines))
    train, _, _ = write(tmp_path / "out", "--mix", tmp_path / "sft.jsonl", "--mix_ratio", 0.5)
    exchanges = list(map(last_exchange, train))
    ordinary = [each for each in exchanges if each in (("1+1?", "2"), ("二加二？", "四"))]
    assert len(ordinary) == round((len(train) - len(ordinary)) * 0.5)
    assert (
        "Buddy" not in json.dumps(train) and "3 ordinary rows in which a model introduces" in capsys.readouterr().out
    )
    assert any(len(row["messages"]) == 4 for row in train)  # an ordinary exchange before the question
    again, _, _ = write(tmp_path / "again", "--mix", tmp_path / "sft.jsonl", "--mix_ratio", 0.5)
    assert again == train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", " "], "name is"),
        (["--author", "a{b}"], "author is .*without braces"),
        (["--name_en", "<|im_end|>"], "name_en is"),
        (["--mix_ratio", -1], "mix_ratio is -1"),
        (["--mix", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run("data/identity.py", *NAMES, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_rows_without_anything_ordinary_are_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am Buddy."}]}
    (tmp_path / "sft.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="no row is left"):
        run("data/identity.py", *NAMES, "--output", tmp_path / "out", "--mix", tmp_path / "sft.jsonl")
