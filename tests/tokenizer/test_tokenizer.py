"""Tests of tokenizer training: round trips, splitting, special tokens, chat template, error messages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from gguf_tokenizer import PRE_TOKENIZERS
from tiny_tokenizer import TEXTS, run, train_tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer, Qwen2Tokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from buddygpt.cli.checkpoints import end_of_answer_token, save_tokenizer
from buddygpt.cli.errors import UserError
from buddygpt.tokenizer import byte_level_bpe, train_tokenizer
from buddygpt.tokenizer.byte_level_bpe import PATTERN

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "北京的天气？"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, {"name": "weather", "arguments": '{"city": "上海"}'}]},
    {"role": "tool", "content": "晴"},
    {"role": "tool", "content": "雨"},
    {"role": "assistant", "content": "北京晴，上海雨。"},
    {"role": "user", "content": "Thanks 👍🏽"},
    {"role": "assistant", "content": "\n  再见\n"},
]
ASSISTANT_TURNS = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call><|im_end|>',
    "北京晴，上海雨。<|im_end|>",
    "再见\n<|im_end|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_every_text_comes_back(tokenizer):
    planes = "".join(chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    texts = [*TEXTS, planes, "\r\n\r\n \t\u3000\u2028x\x00", " a  b   c\n \n", "e\u0301 é ﬁ １２３ ㍿", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_text_is_split_between_scripts_and_digits(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer

    def pieces(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]

    assert pieces("你好，world！我们use Python3.11编程。") == [
        *("你好", "，world", "！我们use", " Python", "3", ".", "1", "1", "编程", "。")
    ]
    assert pieces("x = self._size[10]\n        return") == [
        *("x", " =", " self", "._", "size", "[", "1", "0", "]\n", "       ", " return")
    ]
    assert pieces("二〇二六年 １２") == ["二", "〇", "二六年", " ", "１", "２"]


def test_text_is_split_as_llama_cpp_can():
    assert PRE_TOKENIZERS["qwen2"] == [PATTERN]


def test_entries_are_characters_or_prefixes_of_their_bytes(tokenizer):
    byte = {char: value for value, char in byte_level_bpe.BYTE_CHARACTERS.items()}
    for token in sorted(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()):
        data = bytes(byte[char] for char in token)
        text = data.decode(errors="ignore")
        assert len(data) == 1 or text.encode() == data or (not text and data[0] >= 0xC0)
        assert sum(char.isdigit() for char in text) <= 1
        if any("\u4e00" <= char <= "\u9fff" for char in text):
            assert not any(char.isascii() and char.isalpha() for char in text)


def test_rare_characters_digits_and_indentation(tokenizer):
    for text in ("龘𠮷㐀", "👨‍👩‍👧‍👦 👍🏽 ❤️‍🔥", "1234567", "\tif x:\n            pass\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) <= len(text.encode())
    assert len(tokenizer("1234567").input_ids) == 7


def test_frequent_characters_get_an_entry():
    counts = byte_level_bpe.count_characters(["的" * 999 + "é" * 30 + "龘"])
    assert (counts[ord("的")], counts[ord("é")], counts.sum()) == (999, 30, 1030)
    characters, built = byte_level_bpe.choose_characters(counts, 1000, 2)
    assert characters[128:] == ["的", "é"] and built == ["的".encode()[:2], "的".encode(), "é".encode()]
    assert byte_level_bpe.choose_characters(counts, len(byte_level_bpe.FIXED_ENTRIES) + 2, 2)[1] == built[:2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_limited_by_max_bytes(tmp_path):
    words = ["".join(random.Random(i).choices([chr(0x4E00 + k) for k in range(3000)], k=2)) for i in range(20_000)]
    texts = ["".join(random.Random(i).choices(words, k=500)) for i in range(2000)]  # 6 MB, no two runs alike
    script = (
        "import sys; from buddygpt.tokenizer import train_tokenizer\n"
        "def kb(key): return int(open('/proc/self/status').read().split(key + ':')[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = kb('VmRSS')\n"
        "sys.argv = ['x', *sys.argv[2:]]; train_tokenizer.main(); print((kb('VmHWM') - before) * 1024)"
    )
    options = ["--files", write_jsonl(tmp_path / "a.jsonl", texts), "--output", tmp_path / "out"]
    options += ["--vocab_size", "6000", "--max_bytes", "3000000"]
    command = [sys.executable, "-c", script, ROOT / "tokenizer", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 85 * 3_000_000  # 400 MB without the limit; real text needs half


def test_special_tokens_are_distinct_and_whole(tokenizer):
    assert len(tokenizer) == 400
    separator = tokenizer.document_separator_token
    assert [separator, tokenizer.eos_token, tokenizer.pad_token] == ["<|endoftext|>", "<|im_end|>", "<|pad|>"]
    assert tokenizer.bos_token is None
    names = byte_level_bpe.SPECIAL_TOKENS + byte_level_bpe.TOOL_TOKENS
    assert [tokenizer(name).input_ids for name in names] == [[i] for i in range(8)]
    assert tokenizer.model_max_length == 32768
    call = tokenizer("<tool_call>{}</tool_call><|im_end|>").input_ids
    assert tokenizer.decode(call, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


def test_transformers_4_can_read_what_is_saved(folder, tokenizer, tmp_path):
    saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (saved["tokenizer_class"], saved["extra_special_tokens"]) == ("PreTrainedTokenizerFast", {})
    assert saved["document_separator_token"] == "<|endoftext|>"

    # Version 4 expects unnamed special tokens under another key, and keeps the names of stock classes.
    unnamed = AutoTokenizer.from_pretrained(folder)
    unnamed.add_special_tokens({"extra_special_tokens": ["<|think|>"]})
    save_tokenizer(unnamed, tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["additional_special_tokens"] == ["<|think|>"] and "extra_special_tokens" not in saved
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|think|>"] and again.document_separator_token == "<|endoftext|>"
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    save_tokenizer(Qwen2Tokenizer(vocab={"a": 0}, merges=[]), tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.slow
def test_a_fresh_process_reads_the_folder_and_trains_the_same_bytes(folder):
    script = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(t.document_separator_token, t.decode(t('春天 come 1').input_ids), 'generation' in t.chat_template);"
        "from buddygpt.tokenizer import train_tokenizer; sys.argv = ['x', *sys.argv[3:]];"
        "train_tokenizer.main()"
    )
    again = folder.parent / "again"
    texts = folder.parent / "text.jsonl"
    arguments = ["--files", texts, "--output", again, "--vocab_size", "400"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script, folder, ROOT / "tokenizer", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "<|endoftext|> 春天 come 1 True"
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_template_marks_exactly_the_assistant_turns(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
    turns, previous = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not previous:
            turns.append([])
        if mask:
            turns[-1].append(token)
        previous = mask
    assert [tokenizer.decode(turn) for turn in turns] == ASSISTANT_TURNS


def test_the_chat_is_rendered_as_chatml(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n北京的天气？<|im_end|>\n")
    response = "<tool_response>\n晴\n</tool_response>\n<tool_response>\n雨\n</tool_response><|im_end|>\n"
    assert f"<|im_start|>user\n{response}<|im_start|>assistant\n北京晴" in text
    assert text.endswith("再见\n<|im_end|>\n<|im_start|>assistant\n")
    with_tools = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    assert with_tools.count("<|im_start|>system") == 1 and "Be brief.\n\n# Tools" in with_tools
    no_system = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False)
    assert no_system == "<|im_start|>user\n北京的天气？<|im_end|>"


def test_a_chat_ends_with_the_end_mark_of_its_last_turn(tokenizer):
    # Trainers take what follows the prompt as the answer: a line end there would be trained as a part of it.
    prompt = tokenizer.apply_chat_template(CHAT[1:2], add_generation_prompt=True, return_dict=False)
    answer = {"role": "assistant", "content": "再见"}
    chat = tokenizer.apply_chat_template([*CHAT[1:2], answer], return_dict=False)
    assert chat[: len(prompt)] == prompt and tokenizer.decode(chat[len(prompt) :]) == "再见<|im_end|>"
    for tools in (None, TOOLS):
        for end in range(1, len(CHAT) + 1):
            text = tokenizer.apply_chat_template(CHAT[:end], tools=tools, tokenize=False)
            prompt = tokenizer.apply_chat_template(CHAT[:end], tools=tools, tokenize=False, add_generation_prompt=True)
            assert text.endswith("<|im_end|>") and prompt == f"{text}\n<|im_start|>assistant\n"


def test_the_token_that_ends_an_answer_is_found(folder):
    other = AutoTokenizer.from_pretrained(folder)
    other.eos_token = "<|endoftext|>"
    assert end_of_answer_token(other) == "<|im_end|>"
    turn = "{% for each in messages %}{{ each.content }}{{ 'END' if each.role == 'assistant' }}{% endfor %}"
    for end, expected in {"</tool_call><|im_end|>\n": "<|im_end|>", "<|im_end|><|endoftext|>": "<|im_end|>"}.items():
        other.chat_template = turn.replace("END", end)
        assert end_of_answer_token(other) == expected
    other.chat_template = turn.replace("'END'", "eos_token")
    assert end_of_answer_token(other) == "<|endoftext|>"
    without, refusing = turn.replace("END", ""), "{{ raise_exception('no') }}"
    for template, message in {without: "ends answers without a special token", refusing: "refuses an answer"}.items():
        other.chat_template = template
        with pytest.raises(UserError, match=message):
            end_of_answer_token(other)


def test_a_developer_turn_is_a_system_turn(tokenizer):
    developer = [CHAT[0] | {"role": "developer"}, *CHAT[1:]]
    for tools in (None, TOOLS):
        texts = [tokenizer.apply_chat_template(chat, tools=tools, tokenize=False) for chat in (CHAT, developer)]
        assert texts[0] == texts[1]


def test_a_longer_chat_begins_with_the_tokens_of_its_earlier_turns(tokenizer):
    ids = tokenizer.apply_chat_template(CHAT, tools=TOOLS, return_dict=False)
    for end in (2, 3, 5, 6, 7):
        earlier = tokenizer.apply_chat_template(CHAT[:end], tools=TOOLS, return_dict=False)
        assert ids[: len(earlier)] == earlier


def test_trl_trains_on_the_template_as_it_is(tokenizer):
    assert get_training_chat_template(tokenizer) is None
    assert is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer) and supports_tool_calling(tokenizer)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role: human"):
        tokenizer.apply_chat_template([{"role": "human", "content": "?"}], tokenize=False)


def test_max_bytes_takes_a_share_of_every_file(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name * 50] * 100) for name in "ab"]
    texts = list(train_tokenizer.read_texts(files, ["text"], 1000))
    assert sum(map(len, texts)) <= 1000
    assert {text[0] for text in texts} == {"a", "b"}


def test_long_documents_are_read_in_pieces(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["字" * 250_000])
    texts = list(train_tokenizer.read_texts([file], ["text"], 10**8))
    assert [len(text) for text in texts] == [100_000, 100_000, 50_000]


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (b'{"text": "a"}\n', ["--vocab_size", "263"], "vocab_size 263 is too small: .* take 264"),
        (b"", [], "there is no text"),
        (b'{"text": ""}\n', [], "there is no text"),
        (b'{"text": "a"}\n{"text": "b"\n', [], r"a\.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', [], r"a\.jsonl:2: not valid UTF-8"),
        (b'{"text": "a"}\n{"content": "b"}\n', [], r"a\.jsonl:2: no column `text`; there are: content"),
        (b'{"text": "a"}\n', ["--files", "nowhere/*.txt"], r"no file matches `nowhere/\*\.txt`"),
        (b'{"text": "a"}\n', ["--vocabulary", "1"], "unknown argument"),
        (b'{"text": "a"}\n', ["--prune_from", "x"], "unknown argument `--prune_from`"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(content, arguments, message, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        options = ["--files", tmp_path / "a.jsonl", "--output", tmp_path / "out", *arguments]
        run(train_tokenizer, monkeypatch, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("好\n".encode() + "好".encode("gbk"))
    with pytest.raises(UserError, match=r"a\.txt:2: not valid UTF-8"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a.txt", "--output", tmp_path / "out")


def test_a_folder_that_is_not_a_tokenizer_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not a tokenizer folder"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a", "--output", tmp_path / "mine")
    for name in ("tokenizer.json", "model.safetensors"):  # a model has a tokenizer, too
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds more than a tokenizer \(model.safetensors\)"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a", "--output", tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()  # a tokenizer that was downloaded
    (tmp_path / "mine" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match="mine holds a tokenizer from elsewhere; choose another"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a", "--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "tokenizer.json").read_text() == "{}"
