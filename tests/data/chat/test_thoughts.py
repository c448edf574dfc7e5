"""Chats with thoughts and calls in training: what carries loss, and that inference renders the same tokens."""

import json
import random
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import ROOT
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.checker import RowChecker, convert
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.rules import BadRow, check_row
from buddygpt.data.chat.schemas import recognize
from buddygpt.data.chat.thoughts import split_by_questions
from buddygpt.data.text.rows import Row

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "北京", "b": [1, {"c": None}]}}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"a": "北京", "b": [1, {"c": null}]}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ZH = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
NO_THOUGHTS = {"enable_thinking": False}
SECRETS = ("question", "result")  # what users and tools say here


def user(text="question"):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def thought(text):
    return f"<think>\n{text}\n</think>\n\n"


RESULT = {"role": "tool", "content": "result"}
LONG = [
    user(),
    assistant(thought("T1"), tool_calls=[CALL, CALL]),
    RESULT,
    RESULT,
    assistant(thought("T2") + "A1"),
    user(),
    assistant("A2"),
    user(),
    assistant(thought("T3") + "A3", tool_calls=[CALL]),
    RESULT,
    assistant("A4"),
]

PLAIN_CALLS = [turn | {"content": turn["content"].rpartition("</think>\n\n")[2]} for turn in LONG]


def as_generated(turn) -> str:
    calls = [CALLED] * len(turn.get("tool_calls", []))
    gap = "\n" if calls and turn["content"] and not turn["content"].endswith("</think>\n\n") else ""
    return f"{turn['content']}{gap}{chr(10).join(calls)}<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def load(tmp_path, tokenizer, *rows, **options):
    """Write rows, load them as sft.py does, and return the answers with loss of each row that comes out."""
    file = tmp_path / f"{random.random()}.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    loaded = load_rows([str(file)], "sft", tokenizer=tokenizer, **options)
    texts = []
    for row in loaded:
        spans = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if label != -100:
                spans[-1].append(token)
            elif spans[-1]:
                spans.append([])
        texts.append([tokenizer.decode(span) for span in spans if span])
    return loaded, texts


def test_each_answer_is_trained_once_in_the_context_that_inference_renders(tmp_path, tokenizer):
    cases = [
        ({"messages": LONG, "tools": TOOLS}, 2),
        ({"messages": LONG[:5]}, 1),
        ({"messages": [*LONG[:5], user(), assistant("A2")]}, 2),
        ({"messages": [user(), assistant("A1"), user(), assistant("A2")]}, 1),
        ({"messages": [user(), assistant("A1"), user(), assistant("A2")], "chat_template_kwargs": NO_THOUGHTS}, 2),
        ({"messages": PLAIN_CALLS, "chat_template_kwargs": NO_THOUGHTS}, 3),
        ({"messages": PLAIN_CALLS}, 1),
    ]
    for row, n_rows in cases:
        loaded, texts = load(tmp_path, tokenizer, row)
        assert len(loaded) == n_rows
        trained = [text for of_row in texts for text in of_row]
        expected = [as_generated(turn) for turn in row["messages"] if turn["role"] == "assistant"]
        assert sorted(trained) == sorted(expected)
        assert not any(secret in text for text in trained for secret in SECRETS)

        # The tokens before each answer are the prompt of the same chat at that place, as a client sends it.
        switch = row.get("chat_template_kwargs") or {}
        prompts = set()
        for place, turn in enumerate(row["messages"]):
            if turn["role"] == "assistant":
                sent = row["messages"][:place]
                options = {"tools": row.get("tools"), "add_generation_prompt": True, "return_dict": False}
                prompts.add(tuple(tokenizer.apply_chat_template(sent, **options, **switch)))
        contexts = set()
        for each in loaded:
            labels = [-100, *each["labels"]]
            for place in range(1, len(labels)):
                if labels[place] != -100 and labels[place - 1] == -100:
                    contexts.add(tuple(each["input_ids"][: place - 1]))
        assert contexts == prompts


def test_marks_without_loss_stay_when_a_row_is_split():
    first, last = assistant(thought("T") + "A", weight=0), assistant("B")
    assert split_by_questions({"messages": [user(), first, user(), last]}) == [
        {"messages": [user(), assistant("A", weight=0), user(), last]}
    ]
    rows = split_by_questions({"messages": [user(), assistant(thought("T") + "A"), user(), assistant("B", weight=0)]})
    assert [row["messages"] for row in rows] == [[user(), assistant(thought("T") + "A")]]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        (["calls"], [[f"{CALLED}\n{CALLED}<|im_end|>"], [f"\n{CALLED}<|im_end|>"]]),
        (["text"], [["A1<|im_end|>"], ["A2<|im_end|>", "A3", "A4<|im_end|>"]]),
        (["thoughts"], [[thought("T1"), thought("T2")], [thought("T3")]]),
        (
            ["calls", "text"],
            [
                [f"{CALLED}\n{CALLED}<|im_end|>", "A1<|im_end|>"],
                ["A2<|im_end|>", f"A3\n{CALLED}<|im_end|>", "A4<|im_end|>"],
            ],
        ),
    ],
)
def test_thoughts_calls_and_text_carry_loss_as_configured(tmp_path, tokenizer, loss_on, expected):
    _, texts = load(tmp_path, tokenizer, {"messages": LONG}, loss_on=loss_on)
    # Splits between parts may lie inside a token; the part with the token's first character has it.
    assert [["".join(text.split()) for text in row] for row in texts] == [
        ["".join(text.split()) for text in row] for row in expected
    ]


def test_the_doctor_counts_the_tokens_that_are_trained(tmp_path, tokenizer):
    row = {"messages": LONG, "tools": TOOLS}
    loaded, _ = load(tmp_path, tokenizer, row)
    checker = RowChecker("sft", tokenizer=tokenizer)
    (checked,) = checker.check_all([Row(1, row, None)], recognize(row, "sft")[0])
    assert [each.ids for each in checked.sequences[0]] == loaded["input_ids"][:]


def test_the_switch_is_read_in_published_spellings_and_checked():
    plain = {"messages": ZH}
    for keys, expected in [
        ({"chat_template_kwargs": NO_THOUGHTS}, NO_THOUGHTS),
        ({"chat_template_kwargs": {"enable_thinking": True, "other": 1}}, {"enable_thinking": True}),
        ({"enable_thinking": False}, NO_THOUGHTS),
        ({"reasoning": "off"}, NO_THOUGHTS),
        ({"enable_thinking": "?"}, None),
        ({}, None),
    ]:
        row, unread = plain | keys, []
        (standard,), _ = convert(row, recognize(row, "sft")[0], unread=unread)
        assert standard.get("chat_template_kwargs") == expected and not unread
    for value in ([1], {"enable_thinking": "no"}, {"other": True}):
        with pytest.raises(BadRow, match="chat_template_kwargs is"):
            check_row(plain | {"chat_template_kwargs": value}, "sft")
    with pytest.raises(BadRow, match="turns thinking off, but an answer has thoughts"):
        check_row({"messages": LONG, "chat_template_kwargs": NO_THOUGHTS}, "sft")


def test_a_recipe_refuses_unknown_parts(monkeypatch, tmp_path):
    from buddygpt.cli.arguments import parse_arguments

    spec = spec_from_file_location("sft", ROOT / "sft" / "sft.py")
    recipe = module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr("sys.argv", ["sft.py", "--train_files", "a", "--loss_on", "calls", "results"])
    with pytest.raises(
        UserError, match=r"loss_on is \['calls', 'results'\]; give one or more of thoughts, calls, text"
    ):
        parse_arguments(recipe.SFTArguments, description="")


def test_plain_rows_are_loaded_as_before(tmp_path, tokenizer):
    loaded, texts = load(tmp_path, tokenizer, {"messages": ZH})
    assert loaded["messages"][:] == [ZH] and "chat_template_kwargs" not in loaded.column_names and len(texts) == 1
    loaded, _ = load(tmp_path, tokenizer, {"messages": ZH}, {"messages": ZH, "chat_template_kwargs": NO_THOUGHTS})
    assert loaded["chat_template_kwargs"][:] == [None, NO_THOUGHTS]
