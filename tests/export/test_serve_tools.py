"""Thoughts and calls through `transformers serve`: prompts have the tokens of training, and answers are parsed."""

import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from test_chat_serve import server  # noqa: F401  the fixture serves `native` of this file
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig
from transformers.cli.serving.utils import BaseHandler, Modality

from buddygpt.data.chat.thoughts import template_options
from buddygpt.data.chat.tokens import tokenize
from buddygpt.export import to_native
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

pytestmark = pytest.mark.slow  # starts a server
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
NO_THOUGHTS = {"enable_thinking": False}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(**arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


ROWS = {
    "thinks": {"messages": [user("春天？"), assistant("<think>\n桃花\n</think>\n\n到了。")]},
    "does not": {"messages": [user("春天？"), assistant("是的！")], "chat_template_kwargs": NO_THOUGHTS},
    "calls": {
        "messages": [
            user("1+2, 3+4?"),
            assistant("", tool_calls=[call(b=1, a="孩"), call()]),
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "7"},
            assistant("3 7"),
        ],
        "tools": TOOLS,
    },
    "goes on": {
        "messages": [user("a"), assistant("b"), user("春天？"), assistant("<think>\n读书\n</think>\n\n唱歌。")]
    },
}


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """An exported tiny model that has memorized the rows."""
    folder = tmp_path_factory.mktemp("tools")
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(folder))
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = BuddyGPTForCausalLM(
        BuddyGPTConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **ends)
    )
    model.generation_config = GenerationConfig(**ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = []
    for row in ROWS.values():
        ((ids, loss),) = tokenize(row, "sft", tokenizer)
        ids, loss = torch.tensor([ids]), torch.tensor([loss])
        batches.append({"input_ids": ids, "labels": ids.masked_fill(loss == 0, -100)})
    for step in range(400):
        losses = [model(**batch).loss for batch in batches]
        if max(losses) < 0.01:
            break
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.99**step
        optimizer.step()
        optimizer.zero_grad()
    assert max(losses) < 0.05, "the model did not memorize the rows"
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--checkpoint", str(folder / "source"), "--output", str(folder / "native")])
        to_native.main()
    return folder / "native"


def ask(native, server, row, messages) -> tuple[dict, int]:  # noqa: F811
    """Return the message that the server answers with, and the tokens of its prompt."""
    body = {"model": str(native), "messages": messages, "temperature": 0, "max_tokens": 120}
    body |= {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        done = json.load(response)
    return done["choices"][0]["message"], done["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", ROWS)
def test_the_server_renders_and_answers_what_was_trained(native, server, name):  # noqa: F811
    row = ROWS[name]
    tokenizer = AutoTokenizer.from_pretrained(native)
    ((ids, _),) = tokenize(row, "sft", AutoTokenizer.from_pretrained(native.parent / "source"))
    sent = []  # what a client has: messages as the server returned them, and results
    for turn in row["messages"]:
        if turn["role"] != "assistant" or turn["content"] == "b":
            sent.append(turn)
            continue
        # The tokens that the server makes of the messages are those of training up to this answer.
        inputs = BaseHandler.get_processor_inputs_from_messages(sent, Modality.LLM)
        options = {"tools": row.get("tools"), "add_generation_prompt": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(inputs, **options, **template_options(row))
        assert ids[: len(prompt)] == prompt

        message, n_tokens = ask(native, server, row, sent)
        assert n_tokens == len(prompt)
        thoughts, _, text = turn["content"].rpartition("\n</think>\n\n")
        assert (message["content"] or "") == text
        assert (message.get("reasoning_content") or "") == thoughts.removeprefix("<think>\n")
        calls = [each["function"] for each in message.get("tool_calls") or []]
        expected = [each["function"] for each in turn.get("tool_calls", [])]
        assert [{**each, "arguments": json.loads(each["arguments"])} for each in calls] == expected
        sent.append({key: value for key, value in message.items() if value is not None})
