"""Chat rows become tokens whose answers end at their mark; what cannot be learned is left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import common_prefix_length

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.rules import BadRow
from buddygpt.data.chat.tokens import GENERATION_MARK, shared_start, tokenize, tokenize_rows

ZH = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是一个小模型。"}]
PAIR = {"prompt": ZH[:1], "chosen": ZH[1:], "rejected": [{"role": "assistant", "content": "走开。"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pairs_that_differ_only_in_what_is_cut_off_are_left_out(tmp_path, monkeypatch, tokenizer, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    same = "你好，世界。" * 20
    pair = PAIR | {key: [{"role": "assistant", "content": same + key}] for key in ("chosen", "rejected")}
    rows = "".join(json.dumps(row) + "\n" for row in [PAIR] * 10 + [pair])
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    file = [str(tmp_path / "a.jsonl")]
    assert len(load_rows(file, "preference", tokenizer=loaded)) == 11
    for keep_end, kept in ((False, 10), (True, 11)):
        assert len(load_rows(file, "preference", tokenizer=loaded, max_length=64, keep_end=keep_end)) == kept
    assert "1 of 11 rows have no two different answers within max_length 64" in capsys.readouterr().out


@pytest.mark.parametrize("eos", [None, "<|endoftext|>"], ids=["as trained", "as published"])
def test_an_answer_ends_at_its_first_end_mark(tokenizer, eos):
    """As Phi-3's template, which writes the eos token after the last turn; calls end with a mark of their own."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.eos_token = eos or loaded.eos_token
    loaded.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>' ~ c.function ~ '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endgeneration %}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
    )
    (ids, _), _ = tokenize(PAIR, "preference", loaded)
    assert loaded.decode(ids).endswith(PAIR["chosen"][0]["content"] + "<|im_end|>")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    row = {"messages": [ZH[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    ((ids, loss),) = tokenize(row, "sft", loaded)
    assert loaded.decode(ids).endswith("</tool_call><|im_end|>") and loss[-1] == 1


def test_tool_calls_that_a_template_leaves_out_make_a_row_bad(tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {"messages": [ZH[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    tokenize(row, "sft", loaded)
    loaded.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(BadRow, match="the chat template leaves tool calls or their results out"):
        tokenize(row, "sft", loaded)


def test_rows_are_tokenized_together_as_one_by_one(tokenizer, monkeypatch):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = loaded.chat_template.replace(
        "{%", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{%", 1
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    plain, refused = {"messages": ZH}, {"messages": [{"role": "system", "content": "s"}, *ZH]}
    rows = [plain, {"messages": ZH * 2, "tools": [tool]}, {"messages": ZH * 3}, refused, plain, {"messages": ZH * 4}]
    together = tokenize_rows(rows, "sft", loaded)
    assert "the chat template refuses it: no system" in str(together[3])
    for row, sequences in zip(rows[:3] + rows[4:], together[:3] + together[4:], strict=True):
        assert sequences == tokenize(row, "sft", loaded) and sum(sequences[0].loss)
    longer = PAIR | {"prompt": ZH * 2 + ZH[:1]}
    assert tokenize_rows([PAIR, longer], "preference", loaded) == [
        tokenize(row, "preference", loaded) for row in (PAIR, longer)
    ]

    calls = []
    apply = type(loaded).apply_chat_template
    monkeypatch.setattr(type(loaded), "apply_chat_template", lambda *a, **k: calls.append(1) or apply(*a, **k))
    tokenize_rows([plain] * 50, "sft", loaded)
    assert len(calls) == 1


def test_cached_tokens_are_not_those_of_another_eos_token(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ZH}) + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = (
        "{% for m in messages %}{{ eos_token }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    for eos in ("<|im_end|>", "<|endoftext|>"):
        loaded.eos_token = eos
        [row] = load_rows([str(tmp_path / "a.jsonl")], "sft", tokenizer=loaded)
        assert loaded.decode(row["input_ids"]).startswith(eos)


def test_the_doctor_reads_a_tokenizer_as_auto_tokenizer_does_but_without_torch(tokenizer):
    ours, theirs = load_tokenizer(str(tokenizer)), AutoTokenizer.from_pretrained(tokenizer)
    assert type(ours) is type(theirs) and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for field in ("special_tokens_map", "chat_template", "init_kwargs", "model_max_length", "name_or_path"):
        assert getattr(ours, field) == getattr(theirs, field), field
    code = (
        "import sys; from buddygpt.cli.checkpoints import load_tokenizer; import buddygpt.data.doctor; "
        "load_tokenizer(sys.argv[1]); print({'torch', 'trl', 'datasets', 'scipy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tokenizer)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", "these take seconds to import"


def test_marks_and_shared_starts_are_found_as_trl_finds_them():
    for template in (
        "{% generation %}",
        "{%- generation -%}",
        "{%-  generation%}",
        "{% endgeneration %}",
        "generation",
    ):
        assert bool(GENERATION_MARK.search(template)) == has_generation_markers(template)
    for first, second in (
        ([], []),
        ([1], []),
        ([1, 2], [1, 2]),
        ([1, 2], [1, 2, 3]),
        ([1, 2, 4], [1, 3, 4]),
        ([1], [2]),
    ):
        assert shared_start(first, second) == common_prefix_length(first, second)
