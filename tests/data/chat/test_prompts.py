"""Prompts are read with their answers; rows of other methods, and rows that no reward judges, are refused."""

import json

import pytest
from standard_rows import ANSWER, CALL, FOLLOW_UP, LABELED, PAIR, TOOL, TOOL_ROW, USER
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.prompts import load_prompts, read_prompt, render_prompt
from buddygpt.data.text.rows import Row

CALL_ROW = {"messages": TOOL_ROW["messages"][:2], "tools": [TOOL]}
READ = {
    "question": ({"prompt": "q", "answer": "a"}, ([USER], ["a"])),
    "messages": ({"prompt": FOLLOW_UP["messages"][:-1], "answer": 8}, (FOLLOW_UP["messages"][:-1], ["8"])),
    "several answers": ({"prompt": "q", "answer": ["川", "蜀"]}, ([USER], ["川", "蜀"])),
    "no answer": ({"prompt": "q", "answer": None}, ([USER], None)),
    "solution": ({"prompt": "q", "solution": "8"}, ([USER], ["8"])),
    "verl": ({"prompt": [USER], "reward_model": {"ground_truth": "8", "style": "rule"}}, ([USER], ["8"])),
    "instruction": (ANSWER, ([USER], ["a"])),
    "follow-up": (FOLLOW_UP, (FOLLOW_UP["messages"][:-1], ["a"])),
    "unanswered": ({"messages": [USER]}, ([USER], None)),
    "call": (CALL_ROW, ([USER], [json.dumps([CALL["function"]])])),
    "after a call": (TOOL_ROW, (TOOL_ROW["messages"][:-1], ["a"])),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


@pytest.mark.parametrize("name", READ)
def test_prompts_and_answers_are_read(name, tokenizer, tmp_path):
    row, (prompt, answer) = READ[name]
    (loaded,) = load_prompts(write(tmp_path / "rows.jsonl", row), tokenizer)
    assert (loaded["prompt"], loaded["answer"], loaded["row"]) == (prompt, answer, row)
    assert loaded["tools"] == row.get("tools")


REFUSED = {
    "pairs": (PAIR, "not a prompt but a row of kind preference: train on them with rlhf/dpo.py"),
    "labels": (LABELED, "not a prompt but a row of kind kto: train on them with"),
    "columns": ({"question": "q", "answer": "a"}, "neither prompt nor messages; keys: question, answer. Convert"),
    "no question": ({"prompt": []}, "turn 1 is `assistant` after `start`"),
    "empty": ({"prompt": "  "}, r"turn 1 \(user\) is empty"),
    "answered": ({"prompt": ANSWER["messages"]}, "turn 3 is `assistant` after `assistant`"),
    "special token": ({"prompt": "a<|im_end|>"}, "the text contains the special token"),
    "number": ({"prompt": 3}, "prompt is neither a text nor a list"),
    "too long": ({"prompt": "春天" * 50}, r"the prompt has \d+ tokens, and only 40 leave room for the answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_refused_with_their_place(name, tokenizer, tmp_path, capsys):
    row, reason = REFUSED[name]
    files = write(tmp_path / "rows.jsonl", {"prompt": "q"}, row)
    with pytest.raises(UserError, match=f"rows.jsonl:2: {reason}"):
        load_prompts(files, tokenizer, max_length=40)
    assert len(load_prompts(files, tokenizer, max_length=40, force=True)) == 1
    assert "1 of 2 rows are bad and left out, first" in capsys.readouterr().out


def test_rows_that_a_reward_cannot_judge_are_refused(tokenizer, tmp_path):
    needs = {"exact_match": lambda row: "" if row["answer"] else "an `answer`"}
    files = write(tmp_path / "rows.jsonl", {"prompt": "q", "answer": "a"}, {"prompt": "q"})
    with pytest.raises(UserError, match="rows.jsonl:2: the reward exact_match needs an `answer`; a reward model"):
        load_prompts(files, tokenizer, needs=needs)
    files = write(tmp_path / "bare.jsonl", {"prompt": "q"})
    with pytest.raises(UserError, match="bare.jsonl: no row has an `answer`, which the reward exact_match needs"):
        load_prompts(files, tokenizer, needs=needs | {"json": lambda row: ""})


# Kinds of data, and the recipe that is named if another one gets them.
KINDS = {
    "text": ({"text": "a page"}, "data/prepare_pretrain.py, and train on these with pretrain/pretrain.py"),
    "instructions": (ANSWER, "train on them with sft/sft.py"),
    "tools": (CALL_ROW, "train on them with sft/sft.py"),
    "pairs": (PAIR, r"rlhf/dpo.py \(or orpo.py, simpo"),
    "labels": (LABELED, "train on them with rlhf/kto.py"),
    "prompt": ({"prompt": [USER], "answer": "8"}, "The rows are prompts .*: rlhf/grpo.py learns from rewards"),
    "question": ({"prompt": "q"}, "The rows are prompts .*: rlhf/grpo.py learns from rewards"),
}
# Kinds of rows that recipes load, and the data that they take.
TAKEN = {"sft": ("instructions", "tools"), "preference": ("pairs",), "kto": ("labels",)}
TAKEN["prompts"] = ("instructions", "tools", "prompt", "question")
WRONG = [(kind, data) for kind, taken in TAKEN.items() for data in KINDS if data not in taken]


@pytest.mark.parametrize(("kind", "data"), WRONG)
def test_data_for_another_recipe_is_told_of_that(kind, data, tokenizer, tmp_path):
    row, recipe = KINDS[data]
    files = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{recipe}") as error:
        load_prompts(files, tokenizer) if kind == "prompts" else load_rows(files, kind)
    assert "\n" not in str(error.value)


def test_tools_are_in_the_prompt(tokenizer):
    row = read_prompt(Row(1, CALL_ROW))
    with_tools = tokenizer.decode(render_prompt(row["prompt"], row["tools"], tokenizer))
    assert '"name": "f"' in with_tools and with_tools.endswith("<|im_start|>assistant\n")
    assert '"name": "f"' not in tokenizer.decode(render_prompt(row["prompt"], None, tokenizer))
