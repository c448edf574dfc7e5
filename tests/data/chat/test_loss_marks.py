"""Marks that exclude turns or rows from the loss are honored or refused, and no key disappears without a word."""

import json

import conftest
import pytest
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.checker import RowChecker
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.schemas import SCHEMAS
from buddygpt.data.chat.tokens import tokenize
from buddygpt.data.text.rows import Row

USER, WRONG, RIGHT = {"role": "user", "content": "一加一？"}, "等于三。", "等于二。"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("一加一等于二。\n" * 50, encoding="utf-8")
    arguments = ["--files", folder / "a.txt", "--vocab_size", 300, "--output", folder / "out"]
    conftest.run("tokenizer/train_tokenizer.py", *arguments)
    return AutoTokenizer.from_pretrained(folder / "out")


def two_answers(**marks: object) -> dict:
    """A row whose first answer has the marks."""
    return {"messages": [USER, answer(WRONG, **marks), USER, answer(RIGHT)]}


def answer(text: str, **marks: object) -> dict:
    return {"role": "assistant", "content": text, **marks}


def check(row: dict, name: str = "messages"):
    return RowChecker(SCHEMAS[name].kind).check(Row(1, row), SCHEMAS[name])


def trained_text(row: dict, tokenizer, **options) -> str:
    [(ids, loss)] = tokenize(row, "sft", tokenizer, **options)
    return tokenizer.decode([token for token, carries_loss in zip(ids, loss, strict=True) if carries_loss])


SHAREGPT = [{"from": "human", "value": "一加一？"}, {"from": "gpt", "value": WRONG}]
SHAREGPT += [{"from": "human", "value": "一加一？"}, {"from": "gpt", "value": RIGHT}]
PAIRS = [{"human": "一加一？", "assistant": WRONG, "loss": False}, {"human": "一加一？", "assistant": RIGHT}]
EXCLUDED = [
    ("messages", two_answers(weight=0)),
    ("messages", two_answers(weight=0.0)),
    ("messages", two_answers(loss=False)),
    ("messages", two_answers(train="false")),
    ("messages", two_answers(loss_weight=0.0)),
    ("messages", two_answers(loss_scale=0)),
    ("messages", two_answers(masked=True)),
    ("messages", two_answers() | {"loss_mask": [0, 0, 0, 1]}),
    ("messages", two_answers() | {"loss": [False, True]}),
    ("sharegpt", {"conversations": SHAREGPT, "loss_mask": [0, 0, 0, 1]}),
    ("sharegpt", {"conversations": [SHAREGPT[0], SHAREGPT[1] | {"train": False}, *SHAREGPT[2:]]}),
    ("human_assistant", {"conversation": PAIRS}),
]


@pytest.mark.parametrize(("name", "row"), EXCLUDED)
def test_an_excluded_answer_carries_no_loss(name, row, tokenizer):
    checked = check(row, name)
    assert not checked.fault and not checked.unread
    assert checked.standard == [two_answers(weight=0)]
    assert trained_text(checked.standard[0], tokenizer) == f"{RIGHT}<|im_end|>"
    # Other tokens than the assistant's carry loss, too, without `assistant_only_loss`.
    everything = trained_text(checked.standard[0], tokenizer, assistant_only=False)
    assert WRONG not in everything and RIGHT in everything and everything.count("一加一？") == 2


def test_an_excluded_call_carries_no_loss(tokenizer):
    messages = [USER, answer("", tool_calls=[CALL], weight=0), {"role": "tool", "content": "2"}, answer(RIGHT)]
    [row] = check({"messages": messages}).standard
    assert trained_text(row, tokenizer) == f"{RIGHT}<|im_end|>"


def test_marks_that_mean_loss_change_nothing(tokenizer):
    for row in (
        two_answers(weight=1),
        two_answers(loss=True),
        two_answers(masked=False),
        two_answers(use_loss=True),
        two_answers(weight=None),
    ):
        assert check(row | {"weight": 1, "train": "true"}).standard == [two_answers()]
    assert check(two_answers() | {"loss": 2.31, "train": "split 1"}).standard == [two_answers()]  # no marks


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (two_answers() | {"weight": 0}, "`weight` excludes the row"),
        (two_answers() | {"train": False}, "`train` excludes the row"),
        (two_answers() | {"loss_weight": 0.0}, "`loss_weight` excludes the row"),
        (two_answers() | {"loss_weight": 0.5}, "`loss_weight` is 0.5"),
        (two_answers(weight=0.3), "`weight` is 0.3"),
        (two_answers() | {"loss_mask": [1, 0, 1]}, "`loss_mask` has 3 values, the row 4 turns"),
        ({"messages": [USER, answer(RIGHT, weight=0)]}, "every answer is marked as without loss"),
        (two_answers(calculate_loss=False), "`calculate_loss` seems to tell which turns carry loss"),
        (two_answers(mask=1), "`mask` seems to tell"),
        (two_answers() | {"masks": [0, 1]}, "`masks` seems to tell"),
        (two_answers(train_detail=[{"begin_offset": 0, "end_offset": 1}]), "`train_detail` gives parts"),
    ],
)
def test_marks_that_cannot_be_honored_make_a_bad_row(row, reason):
    assert reason in check(row).fault


def test_a_marked_answer_of_a_pair_makes_a_bad_row():
    pair = {"prompt": [USER], "chosen": [answer(RIGHT, weight=0)], "rejected": [answer(WRONG)]}
    assert "every answer is marked as without loss" in check(pair, "preference").fault


def test_a_recipe_honors_marks_of_rows_that_were_not_converted(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(two_answers(loss=False) | {"id": "a1", "score": 3, "topic": ""}) + "\n")
    [row] = load_rows([str(file)], "sft", tokenizer=tokenizer)
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == f"{RIGHT}<|im_end|>"
    assert f"{file}: not read: id (1 rows), score (1 rows)\n" in capsys.readouterr().out
    file.write_text(json.dumps(two_answers() | {"loss_mask": [0, 0, 0, 1]}) + "\n")
    with pytest.raises(UserError, match="a list of marks for the loss: convert the row"):
        load_rows([str(file)], "sft")


def test_keys_that_nothing_reads_are_counted_and_named(tmp_path, capsys):
    rows = [
        {"instruction": "q", "output": "a", "Quality": 3, "rating": None},
        {"instruction": "r", "output": "b", "quality": 3, "system": "s", "history": [["a", "b"]]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        conftest.run("data/doctor.py", file)
    assert "not read     Quality (1 rows), quality (1 rows)\n" in capsys.readouterr().out
    conftest.run("data/convert_chat.py", "--input", file, "--output", tmp_path / "b.jsonl")
    assert "1  not read: quality\n" in capsys.readouterr().out
    turn = answer(RIGHT, tool_call_id="1", emotion="calm", keep=False)
    assert check({"messages": [USER, turn]}).unread == ["emotion (of turns)", "keep (of turns)"]
    pair = {"prompt": "q", "chosen": "a", "reject": "b", "margin": 0.2}
    assert check(pair, "prompt_reject").unread == ["margin"]
