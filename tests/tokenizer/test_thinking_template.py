"""The chat template with thoughts and tools: what it renders, and where the loss is; plain chats stay as they are."""

import json
from pathlib import Path

import jinja2
import pytest
import trl
from conftest import ROOT
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer
from trl.chat_template_utils import parse_response

from buddygpt.export.generation_marks import hide_generation_marks

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": [1, 2]}}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": [1, 2]}}\n</tool_call>'
QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


PLAIN = [
    {"role": "system", "content": "Be brief."},
    user("a"),
    assistant("b < c </think> d"),
    user("e"),
    assistant("f"),
]
THINKING = {
    "one turn": [user("a"), assistant(thought("b") + "c")],
    "two turns": [user("a"), assistant(thought("b") + "c"), user("d"), assistant(thought("e\n\nf") + "g")],
    "thoughts in a key": [
        user("a"),
        assistant("c", reasoning_content="b"),
        user("d"),
        assistant("g", reasoning_content="e"),
    ],
    "calls": [
        user("a"),
        assistant(thought("b"), tool_calls=[CALL, CALL]),
        result("1"),
        result("2"),
        assistant(thought("c"), tool_calls=[CALL]),
        result("3"),
        assistant(thought("d") + "e"),
    ],
    "calls, then a question": [
        user("a"),
        assistant(thought("b") + "text", tool_calls=[CALL, CALL]),
        result("1"),
        result("2"),
        assistant(thought("d") + "e"),
        user("f"),
        assistant(thought("g"), tool_calls=[CALL]),
        result("3"),
        assistant(thought("h") + "i"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def render(tokenizer, chat, **options) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chat", THINKING.values(), ids=THINKING)
def test_chats_with_thoughts_are_rendered_as_qwen3_renders_them(tokenizer, chat, tools):
    theirs = QWEN3.read_text(encoding="utf-8")
    for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        for end in range(1, len(chat) + 1):
            options = {"tools": tools, "add_generation_prompt": chat[end - 1]["role"] != "assistant", **switch}
            ours = render(tokenizer, chat[:end], **options)
            assert ours.rstrip("\n") == render(tokenizer, chat[:end], chat_template=theirs, **options).rstrip("\n")


def test_a_chat_without_thoughts_has_no_trace_of_them(tokenizer):
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in PLAIN)
    assert render(tokenizer, PLAIN) + "\n" == expected
    assert render(tokenizer, PLAIN, enable_thinking=True) == render(tokenizer, PLAIN)
    assert render(tokenizer, PLAIN[:2], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("chat", THINKING.values(), ids=THINKING)
def test_a_model_reads_the_tokens_that_it_was_trained_on(tokenizer, chat):
    """Each answer since the last question is trained in the context in which the same chat asks for it."""
    without = [turn | {"content": turn["content"].rpartition("</think>\n\n")[2]} for turn in chat]
    without = [{key: value for key, value in turn.items() if key != "reasoning_content"} for turn in without]
    for turns, switch in ((chat, {}), (without, {"enable_thinking": False}), (without, {})):
        options = {"tools": TOOLS, "return_dict": True, **switch}
        trained = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, **options)
        question = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
        for place in range(question + 1, len(turns)):
            if turns[place]["role"] == "assistant":
                asked = tokenizer.apply_chat_template(turns[:place], add_generation_prompt=True, **options)[
                    "input_ids"
                ]
                assert trained["input_ids"][: len(asked)] == asked
                assert trained["assistant_masks"][len(asked) - 1 : len(asked) + 1] == [0, 1]


def test_empty_thoughts_carry_no_loss_and_real_ones_do(tokenizer):
    def with_loss(turns, **switch):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **switch}
        encoded = tokenizer.apply_chat_template(turns, **options)
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return tokenizer.decode([token for token, mask in pairs if mask])

    plain, calls = [user("a"), assistant("b")], [user("a"), assistant("", tool_calls=[CALL]), result("secret")]
    assert with_loss(plain) == with_loss(plain, enable_thinking=False) == "b<|im_end|>"
    assert with_loss([*calls, assistant("c")], enable_thinking=False) == f"{CALLED}<|im_end|>c<|im_end|>"
    assert with_loss(THINKING["one turn"]) == f"{thought('b')}c<|im_end|>"
    assert with_loss(THINKING["two turns"]) == f"c<|im_end|>{thought('e' + chr(10) * 2 + 'f')}g<|im_end|>"


def test_an_answer_is_read_back_as_thoughts_calls_and_text(tokenizer):
    for text, expected in {
        thought("b") + "c": {"reasoning_content": "b", "content": "c"},
        f"{thought('b')}{CALLED}\n{CALLED}": {"reasoning_content": "b", "tool_calls": [CALL, CALL]},
        f"c\n{CALLED}": {"content": "c", "tool_calls": [CALL]},
        "c": {"content": "c"},
    }.items():
        for switch in ({}, {"enable_thinking": False}):
            options = {"return_dict": False, **switch}
            prompt = tokenizer.apply_chat_template([user("a")], add_generation_prompt=True, **options)
            ids = tokenizer(f"{text}<|im_end|>").input_ids
            parsed = tokenizer.parse_response(ids, prefix=prompt)
            assert parsed == {"role": "assistant"} | expected
            theirs = parse_response(tokenizer, ids, prefix=prompt)  # as TRL's trainers with tools do
            assert {key: theirs[key] for key in expected} == expected
            # ... and what was read renders as what was generated.
            if not (switch and "<think>" in text):
                assert tokenizer.apply_chat_template([user("a"), parsed], **options) == prompt + ids


def test_another_template_engine_renders_the_same(tokenizer):
    """Plain jinja2 stands for engines without transformers' marks, such as llama.cpp's."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    engine = environment.from_string(hide_generation_marks(tokenizer.chat_template))
    for chat in (PLAIN, *THINKING.values()):
        for tools in (None, TOOLS):
            for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
                options = {"tools": tools, "add_generation_prompt": True, **switch}
                assert engine.render(messages=chat, **options) == render(tokenizer, chat, **options)


def test_the_template_uses_what_all_engines_have():
    """Filters and functions beyond those of published templates are missing in some engines, as minja."""
    template = hide_generation_marks((ROOT / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8"))
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    assert {node.name for node in tree.find_all(jinja2.nodes.Filter)} == {"tojson", "join"}
    calls = {getattr(node.node, "attr", None) or node.node.name for node in tree.find_all(jinja2.nodes.Call)}
    assert calls == {"namespace", "startswith", "split", "lstrip", "strip", "raise_exception"}
