"""Does the tokenizer keep every text, split it where it should, and mark what an assistant says, and only that?"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import measure_tokenizer
import pytest
from conftest import ROOT
from gguf_tokenizer import PRE_TOKENIZERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from buddygpt.cli.errors import UserError
from buddygpt.data.text.rows import read_rows
from buddygpt.tokenizer import byte_level_bpe, train_tokenizer
from buddygpt.tokenizer.byte_level_bpe import PATTERN

DATA = ROOT.parent / "shared" / "data"

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
        *("你好", "，world", "！我们use", " Python", "3", ".", "1", "1", "编程", "。")
    ]
    assert pieces("x = self._size[10]\n        return") == [
        *("x", " =", " self", "._", "size", "[", "1", "0", "]\n", "       ", " return")
    ]
    assert pieces("二〇二六年 １２") == ["二", "〇", "二六年", " ", "１", "２"]


def test_text_is_split_as_llama_cpp_can():
    assert PRE_TOKENIZERS["qwen2"] == [PATTERN]


def test_entries_are_characters_and_their_beginnings(tokenizer):
    byte = {char: value for value, char in byte_level_bpe.BYTES.items()}
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


def test_an_entry_is_given_to_characters_that_are_worth_it():
    counts = byte_level_bpe.count_characters(["的" * 999 + "é" * 30 + "龘"])
    assert (counts[ord("的")], counts[ord("é")], counts.sum()) == (999, 30, 1030)
    characters, built = byte_level_bpe.choose_characters(counts, 1000, 2)
    assert characters[128:] == ["的", "é"] and built == ["的".encode()[:2], "的".encode(), "é".encode()]
    assert byte_level_bpe.choose_characters(counts, len(byte_level_bpe.FIXED) + 2, 2)[1] == built[:2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_bounded_by_the_text_that_is_read(tmp_path):
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
    assert int(done.stdout.split()[-1]) < 85 * 3_000_000  # 400 MB if all were read; real text takes half


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


def train_on(tmp_path, monkeypatch, name: str, texts: list[str], *options) -> Path:
    """A tokenizer folder made from texts, by training or by pruning."""
    file = write_jsonl(tmp_path / f"{name}.jsonl", texts)
    run(train_tokenizer, monkeypatch, "--files", file, "--output", tmp_path / name, *options)
    return tmp_path / name


def read_pair(source: Path, made: Path):
    """A tokenizer, what became of it, and old id -> new id; the order of the ids is the same."""
    old_ids = json.loads((made / "old_ids.json").read_text())
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(made)
    assert old_ids == sorted(set(old_ids)) and len(old_ids) == len(after)
    assert before.convert_ids_to_tokens(old_ids) == after.convert_ids_to_tokens(range(len(after)))
    return before, after, {old: new for new, old in enumerate(old_ids)}


def count_same(before, after, new_ids: dict[int, int], texts: list[str]) -> int:
    """How many texts have kept all their tokens; those are tokenized as before."""
    same = 0
    for text in texts:
        ids = before(text).input_ids
        if set(ids) <= new_ids.keys():
            assert after(text).input_ids == [new_ids[i] for i in ids]
            same += 1
    return same


def test_pruning_keeps_what_the_text_uses(folder, tmp_path, monkeypatch, capsys):
    used = [f"{TEXTS[0]}{i}" for i in range(100)]
    made = train_on(tmp_path, monkeypatch, "cut", used, "--prune-from", folder, "--vocab_size", 300)
    assert re.search(
        r"300 of 400 entries\nheld-out text of [\d,]+ bytes: \+\d+\.\d\d% tokens", capsys.readouterr().out
    )
    before, after, new_ids = read_pair(folder, made)
    assert after.get_added_vocab().keys() == before.get_added_vocab().keys()
    names = ["<|endoftext|>", "<|im_end|>", "<|pad|>"]
    assert [after.document_separator_token, after.eos_token, after.pad_token] == names
    assert after.chat_template == before.chat_template and after.model_max_length == before.model_max_length
    pieces = [text[start:end] for text in TEXTS for start in range(20) for end in range(start, 30)]
    assert 50 < count_same(before, after, new_ids, pieces) < len(pieces)
    planes = "".join(chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    assert after.decode(after(planes).input_ids) == planes


def test_a_pruned_vocabulary_is_consistent(folder, tmp_path, monkeypatch):
    made = train_on(tmp_path, monkeypatch, "cut", TEXTS * 3, "--prune_from", folder, "--vocab_size", 320)
    model = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    made_by_merges = {left + right for left, right in model["merges"]}
    assert {part for pair in model["merges"] for part in pair} | made_by_merges <= model["vocab"].keys()
    assert len(model["vocab"]) == 320 == len(byte_level_bpe.FIXED) + len(made_by_merges)


def test_pruning_says_where_the_text_uses_fewer(folder, tmp_path, monkeypatch, capsys):
    made = train_on(tmp_path, monkeypatch, "cut", ["春天到了"] * 9, "--prune_from", folder, "--vocab_size", 390)
    out = capsys.readouterr().out
    assert "warning: the text uses no more than these; `vocab_size` was 390" in out
    before, after, new_ids = read_pair(folder, made)
    assert len(after) < 300 and count_same(before, after, new_ids, ["春天到了"]) == 1


def test_pruning_a_tokenizer_of_another_make(tmp_path, monkeypatch):
    """Several merges for one entry, words before merges, a beginning-of-text token, holes: as in Llama 3."""
    entries = [*byte_level_bpe.BYTES.values(), "xy", "ab", "bc", "abc", "cd", "abcd", "word", "<s>"]
    merges = [("x", "y"), ("b", "c"), ("a", "b"), ("c", "d"), ("ab", "c"), ("a", "bc"), ("ab", "cd"), ("abc", "d")]
    backend = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges, ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(entries) - 1)])]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path / "source")
    texts = [["abcd", "word"][i % 2] for i in range(60)]
    made = train_on(tmp_path, monkeypatch, "cut", texts, "--prune_from", tmp_path / "source", "--vocab_size", 270)
    before, after, new_ids = read_pair(tmp_path / "source", made)
    assert {"abcd", "abc", "bc", "word"} <= after.get_vocab().keys()
    assert after.get_vocab().keys().isdisjoint({"xy", "ab", "cd"}) and after.chat_template is None
    assert after("abcd").input_ids[0] == after.bos_token_id == len(after) - 1
    assert count_same(before, after, new_ids, ["abcd", "xbcx", "abcde", "wordabcd", "abxy", "word word"]) == 5


def test_pruning_gives_our_template_to_chatml_without_one(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    made = train_on(tmp_path, monkeypatch, "cut", TEXTS, "--prune_from", tmp_path / "bare", "--vocab_size", 300)
    expected = train_tokenizer.CHAT_TEMPLATE.read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(made).chat_template == expected


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "no such tokenizer folder"),
        (models.WordLevel({"a": 0}, unk_token="a"), "is WordLevel; only byte-level BPE can be cut"),
        (models.BPE({"a": 0, "b": 1}, []), "BPE, but not byte-level: 254 of 256 bytes have no entry"),
        (models.BPE({char: i for i, char in enumerate(byte_level_bpe.BYTES.values())}, []), "255 is below the 256 of"),
    ],
)
def test_what_cannot_be_pruned_is_named(model, message, tmp_path, monkeypatch):
    if model:
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        train_on(tmp_path, monkeypatch, "cut", ["a"], "--prune_from", tmp_path / "source", "--vocab_size", 255)
    assert not (tmp_path / "cut").exists()


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_qwen_is_pruned_to_a_chinese_vocabulary(tmp_path, monkeypatch, capsys):
    file, qwen = DATA / "pretrain" / "wanjuan_zh_web_sample.jsonl.gz", DATA / "tokenizers" / "qwen2.5"
    options = ["--text_column", "content", "--vocab_size", 16384, "--output", tmp_path / "cut", "--prune-from", qwen]
    run(train_tokenizer, monkeypatch, "--files", file, *options)
    cost = re.search(r"\+(\d\.\d\d)% tokens", capsys.readouterr().out)
    assert float(cost[1]) < 5
    before, after, new_ids = read_pair(qwen, tmp_path / "cut")
    lines = [line for row in read_rows(file, ["content"]) for line in row.content.split("\n")]
    assert count_same(before, after, new_ids, lines) > len(lines) / 2
    text = "e\u0301 龘 👨‍👩‍👧‍👦 １２"  # composed by the normaliser that it has kept
    assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
