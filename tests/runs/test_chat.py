"""The chat in the terminal: it shows what `generate` writes, remembers the conversation, and survives Ctrl-C."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny_models import GQA, make_model
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from buddygpt.cli.errors import run_script

spec = importlib.util.spec_from_file_location("chat", ROOT / "runs" / "chat.py")
chat = importlib.util.module_from_spec(spec)
sys.modules["chat"] = chat
spec.loader.exec_module(chat)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(folder))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": tokenizer.pad_token_id}
    model = make_model(**GQA, **sizes, **ends)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run the command with these lines as input, and return its status, its answers by question, and its errors."""

    def run(model: Path, lines: list[str], *options: object) -> tuple[int, list[str], str]:
        typed = iter(lines)

        def read(prompt: str) -> str:
            print("\n=====")
            return next(typed, "/exit")

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "argv", ["chat", str(model), *map(str, options)])
        status = 0
        try:
            run_script(chat.main)
        except SystemExit as end:
            status = end.code
        output = capsys.readouterr()
        return status, [answer.strip("\n") for answer in output.out.split("\n=====\n")[1:-1]], output.err

    return run


def expected(model: Path, turns: list[tuple[str, str]], count: int = 12) -> str:
    """Return the greedy answer to a conversation."""
    loaded, tokenizer = chat.load(str(model))
    messages = [{"role": role, "content": content} for role, content in turns]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = loaded.eval().generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens).replace("<|im_end|>", "").strip("\n")


GREEDY = ("--temperature", 0, "--max_new_tokens", 12)


def test_answers_are_those_of_generate_for_the_whole_conversation(checkpoint, talk):
    lines = ["春天", "tree", "/system Be brief.", "tree", "/reset", "/nosuch"]
    status, answers, _ = talk(checkpoint, lines, *GREEDY)
    first = expected(checkpoint, [("user", "春天")])
    assert status == 0 and answers[0] == first
    assert answers[1] == expected(checkpoint, [("user", "春天"), ("assistant", first), ("user", "tree")])
    assert answers[2:] == [
        "new conversation, system prompt: Be brief.",
        expected(checkpoint, [("system", "Be brief."), ("user", "tree")]),
        "new conversation, system prompt: Be brief.",
        "there is no /nosuch; use /reset, /system TEXT or /exit",
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program(checkpoint, talk, monkeypatch):
    put, count = chat.AnswerStreamer.put, iter(range(10**6))

    def interrupted(self: object, value: torch.Tensor) -> None:
        if next(count) == 5:  # the prompt and four tokens have been shown
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(chat.AnswerStreamer, "put", interrupted)
    _, answers, _ = talk(checkpoint, ["春天", "/reset", "春天"], *GREEDY)
    assert answers[0] == expected(checkpoint, [("user", "春天")], 4)
    assert answers[2] == expected(checkpoint, [("user", "春天")])


def test_an_adapter_is_merged_into_its_base(checkpoint, talk, tmp_path):
    model, _ = chat.load(str(checkpoint))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(checkpoint)}))
    _, answers, _ = talk(tmp_path / "adapter", ["春天"], *GREEDY)
    assert answers == [expected(tmp_path / "adapter", [("user", "春天")])]
    assert answers != [expected(checkpoint, [("user", "春天")])]


def test_sampling_repeats_with_a_seed_and_a_full_context_is_said(checkpoint, talk):
    options = ("--temperature", 2, "--max_new_tokens", 12)
    _, first, _ = talk(checkpoint, ["春天"], *options, "--seed", 1)
    assert talk(checkpoint, ["春天"], *options, "--seed", 1)[1] == first
    assert talk(checkpoint, ["春天"], *options, "--seed", 2)[1] != first
    _, answers, _ = talk(checkpoint, ["春" * 300, "春天"], *GREEDY)
    assert answers[0].startswith("the conversation does not fit into the context of 256 tokens")
    assert answers[1] == expected(checkpoint, [("user", "春天")])


def test_mistakes_are_one_line(checkpoint, talk, tmp_path):
    for model, options, message in (
        (tmp_path / "none", (), "no such"),
        (checkpoint, ("--temperature", -1), "--temperature is -1.0; use a number from 0 to 100"),
        (checkpoint, ("--device", "nosuch"), "--device nosuch cannot be used: "),
    ):
        status, _, error = talk(model, [], *options)
        assert status == 2 and message in error and error.count("\n") == 1, error


def test_thoughts_and_calls_are_shown_without_the_end(checkpoint, capsys):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = '<think>\n读书\n</think>\n\n<tool_call>\n{"name": "add"}\n</tool_call>'
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    streamer = chat.AnswerStreamer(tokenizer, {end})
    streamer.put(torch.tensor([[end, 5]]))  # the prompt
    for token in [*tokenizer(text).input_ids, end]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == f"{text}\n" == f"{streamer.text}\n"
