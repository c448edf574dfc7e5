"""Does the tokenizer keep every text, split it where it should, and mark what an assistant says, and only that?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from buddygpt.launch import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tokenizer"))
import measure_tokenizer  # noqa: E402
import train_tokenizer  # noqa: E402

TEXTS = [
    "春天到了，院子里的桃花开了。孩子们在树下读书、唱歌。",
    "The spring has come, and the children read under the trees.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))\n",
    "二〇二六年，Python3.11发布了？是的！",
]
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
SAID = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call><|im_end|>',
    "北京晴，上海雨。<|im_end|>",
    "再见\n<|im_end|>",
]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        files = write_jsonl(work / "text.jsonl", TEXTS * 5)
        run(train_tokenizer, patch, "--files", files, "--output", work / "made", "--vocab_size", 400)
    return work / "made"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


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
        *("你好", "，", "world", "！", "我们", "use", " Python", "3", ".", "1", "1", "编程", "。")
    ]
    assert pieces("x = self._size[10]\n        return") == [
        *("x", " =", " self", "._", "size", "[", "1", "0", "]\n", "       ", " return")
    ]
    assert pieces("二〇二六年 １２") == ["二〇二六年", " ", "１", "２"]


def test_no_entry_mixes_chinese_with_anything(tokenizer):
    for token in tokenizer.get_vocab():
        text = tokenizer.convert_tokens_to_string([token])
        if any("\u4e00" <= char <= "\u9fff" for char in text):
            assert "\ufffd" in text or (text.isalnum() and not any(char.isascii() for char in text))
        assert sum(char.isdigit() for char in text) <= 1


def test_special_tokens_are_distinct_and_whole(tokenizer):
    assert len(tokenizer) == 400
    separator = tokenizer.document_separator_token
    assert [separator, tokenizer.eos_token, tokenizer.pad_token] == ["<|endoftext|>", "<|im_end|>", "<|pad|>"]
    assert tokenizer.bos_token is None
    names = train_tokenizer.SPECIAL_TOKENS + train_tokenizer.TOOL_TOKENS
    assert [tokenizer(name).input_ids for name in names] == [[i] for i in range(8)]
    assert tokenizer.model_max_length == 32768
    call = tokenizer("<tool_call>{}</tool_call><|im_end|>").input_ids
    assert tokenizer.decode(call, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


def test_a_fresh_process_reads_the_folder_and_trains_the_same_bytes(folder):
    script = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(t.document_separator_token, t.decode(t('春天 come 1').input_ids), 'generation' in t.chat_template);"
        "sys.path.insert(0, sys.argv[2]); import train_tokenizer; sys.argv = ['x', *sys.argv[3:]];"
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


def test_all_that_an_assistant_says_is_marked_and_nothing_else(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
    turns, previous = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not previous:
            turns.append([])
        if mask:
            turns[-1].append(token)
        previous = mask
    assert [tokenizer.decode(turn) for turn in turns] == SAID


def test_the_chat_is_rendered_as_chatml(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n北京的天气？<|im_end|>\n")
    response = "<tool_response>\n晴\n</tool_response>\n<tool_response>\n雨\n</tool_response><|im_end|>\n"
    assert f"<|im_start|>user\n{response}<|im_start|>assistant\n北京晴" in text
    assert text.endswith("再见\n<|im_end|>\n<|im_start|>assistant\n")
    with_tools = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    assert with_tools.count("<|im_start|>system") == 1 and "Be brief.\n\n# Tools" in with_tools
    no_system = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False)
    assert no_system == "<|im_start|>user\n北京的天气？<|im_end|>\n"


def test_a_chat_begins_as_its_earlier_turns_did(tokenizer):
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
    texts = list(train_tokenizer.read_texts(files, "text", 1000))
    assert sum(map(len, texts)) <= 1000
    assert {text[0] for text in texts} == {"a", "b"}


def test_long_documents_are_read_in_pieces(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["字" * 250_000])
    texts = list(train_tokenizer.read_texts([file], "text", 10**8))
    assert [len(text) for text in texts] == [100_000, 100_000, 50_000]


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (b'{"text": "a"}\n', ["--vocab_size", "263"], "vocab_size 263 is below the 264"),
        (b"", [], "there is no text"),
        (b'{"text": ""}\n', [], "there is no text"),
        (b'{"text": "a"}\n{"text": "b"\n', [], r"a\.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', [], r"a\.jsonl:2: not valid UTF-8"),
        (b'{"text": "a"}\n{"content": "b"}\n', [], r"a\.jsonl:2: no column `text`; there are: content"),
        (b'{"text": "a"}\n', ["--files", "nowhere/*.txt"], r"no file matches `nowhere/\*\.txt`"),
        (b'{"text": "a"}\n', ["--vocabulary", "1"], "unknown argument"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(content, arguments, message, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        options = ["--files", tmp_path / "a.jsonl", "--output", tmp_path / "out", *arguments]
        run(train_tokenizer, monkeypatch, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_text_file_that_is_no_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("好\n".encode() + "好".encode("gbk"))
    with pytest.raises(UserError, match=r"a\.txt:2: not valid UTF-8"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a.txt", "--output", tmp_path / "out")


def test_a_folder_that_is_no_tokenizer_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no tokenizer folder"):
        run(train_tokenizer, monkeypatch, "--files", tmp_path / "a", "--output", tmp_path / "mine")


def test_measuring_counts_what_it_says(folder, tmp_path, monkeypatch, capsys):
    text = write_jsonl(tmp_path / "zh.jsonl", ["春天到了，", "桃花"])
    options = ["--tokenizers", folder, "--texts", f"zh={text}", "--seconds", 0, "--output", tmp_path / "out"]
    run(measure_tokenizer, monkeypatch, *options)
    table = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = sum(len(tokenizer(part).input_ids) for part in ("春天到了，", "桃花"))
    assert f"| made | 400 | zh | {7 / count:.2f} | {21 / count:.2f} |" in table
    assert (tmp_path / "out" / "tokenizers.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "out" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


def test_measuring_knows_four_texts_by_itself(folder, monkeypatch, capsys):
    run(measure_tokenizer, monkeypatch, "--tokenizers", folder, "--seconds", 0)
    table = capsys.readouterr().out
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["zh", "en", "code", "digits"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokenizers", "nowhere"], "cannot read a tokenizer from nowhere"),
        (["--tokenizers", "nowhere", "--texts", "corpus.txt"], "is not NAME=GLOB"),
        (["--tokenizers", "nowhere", "--texts", "zh=nowhere/*"], "no file matches"),
    ],
)
def test_measuring_names_mistakes(arguments, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(measure_tokenizer, monkeypatch, *arguments)


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_real_chinese_takes_fewer_tokens_than_characters(tmp_path, monkeypatch, capsys):
    files, qwen = DATA / "pretrain" / "wikipedia_cn_sample.json", DATA / "tokenizers" / "qwen2.5"
    options = ["--text_column", "completion", "--vocab_size", 4000, "--output", tmp_path / "wiki"]
    run(train_tokenizer, monkeypatch, "--files", files, *options)
    texts = ["--texts", f"zh={files}", "--text_key", "completion", "--seconds", 0]
    run(measure_tokenizer, monkeypatch, "--tokenizers", tmp_path / "wiki", qwen, *texts)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| zh |" in line]
    assert [row[1].strip() for row in rows] == ["wiki", "qwen2.5"]
    assert all(float(row[4]) > 1 for row in rows)
