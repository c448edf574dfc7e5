"""Tests of tools/prune_vocabulary.py: the pruned vocabulary is consistent and tokenizes kept text as before."""

import json
import re
import shutil
from pathlib import Path

import prune_vocabulary
import pytest
from conftest import ROOT
from tiny_tokenizer import TEXTS, run, train_tiny_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from buddygpt.cli.errors import UserError
from buddygpt.data.text.rows import read_rows
from buddygpt.tokenizer import byte_level_bpe, train_tokenizer

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prune(tmp_path, monkeypatch, name: str, texts: list[str], *options) -> Path:
    """Prune a tokenizer to what some texts use; return the new folder."""
    file = write_jsonl(tmp_path / f"{name}.jsonl", texts)
    run(prune_vocabulary, monkeypatch, "--files", file, "--output", tmp_path / name, *options)
    return tmp_path / name


def read_pair(source: Path, made: Path):
    """Return the tokenizers before and after pruning, and old id -> new id. Check that entries kept their order."""
    old_ids = json.loads((made / "old_ids.json").read_text())
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(made)
    assert old_ids == sorted(set(old_ids)) and len(old_ids) == len(after)
    assert before.convert_ids_to_tokens(old_ids) == after.convert_ids_to_tokens(range(len(after)))
    return before, after, {old: new for new, old in enumerate(old_ids)}


def count_same(before, after, new_ids: dict[int, int], texts: list[str]) -> int:
    """Return how many texts kept all their tokens. Check that those are tokenized as before."""
    same = 0
    for text in texts:
        ids = before(text).input_ids
        if set(ids) <= new_ids.keys():
            assert after(text).input_ids == [new_ids[i] for i in ids]
            same += 1
    return same


@pytest.mark.slow
def test_pruning_keeps_what_the_text_uses(folder, tmp_path, monkeypatch, capsys):
    used = [f"{TEXTS[0]}{i}" for i in range(100)]
    made = prune(tmp_path, monkeypatch, "cut", used, "--tokenizer", folder, "--vocab_size", 300)
    assert re.search(
        r"300 of 400 entries\nheld-out text of [\d,]+ bytes: \+\d+\.\d\d% tokens", capsys.readouterr().out
    )
    before, after, new_ids = read_pair(folder, made)
    assert after.get_added_vocab().keys() == before.get_added_vocab().keys()
    names = ["<|endoftext|>", "<|im_end|>", "<|pad|>"]
    assert [after.document_separator_token, after.eos_token, after.pad_token] == names
    assert after.chat_template == before.chat_template and after.model_max_length == before.model_max_length
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (made / "tokenizer_config.json").read_text()
    pieces = [text[start:end] for text in TEXTS for start in range(20) for end in range(start, 30)]
    assert 50 < count_same(before, after, new_ids, pieces) < len(pieces)
    planes = "".join(chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    assert after.decode(after(planes).input_ids) == planes


def test_a_pruned_vocabulary_is_consistent(folder, tmp_path, monkeypatch):
    made = prune(tmp_path, monkeypatch, "cut", TEXTS * 3, "--tokenizer", folder, "--vocab_size", 320)
    model = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    made_by_merges = {left + right for left, right in model["merges"]}
    assert {part for pair in model["merges"] for part in pair} | made_by_merges <= model["vocab"].keys()
    assert len(model["vocab"]) == 320 == len(byte_level_bpe.FIXED_ENTRIES) + len(made_by_merges)


def test_pruning_warns_if_the_text_uses_fewer_entries(folder, tmp_path, monkeypatch, capsys):
    made = prune(tmp_path, monkeypatch, "cut", ["春天到了"] * 9, "--tokenizer", folder, "--vocab_size", 390)
    out = capsys.readouterr().out
    assert "warning: `vocab_size` is 390, but the text uses no more entries" in out
    before, after, new_ids = read_pair(folder, made)
    assert len(after) < 300 and count_same(before, after, new_ids, ["春天到了"]) == 1


def test_pruning_a_tokenizer_with_other_conventions(tmp_path, monkeypatch):
    """As in Llama 3: several merges for one entry, entries without merges, a beginning-of-text token."""
    entries = [*byte_level_bpe.BYTE_CHARACTERS.values(), "xy", "ab", "bc", "abc", "cd", "abcd", "word", "<s>"]
    merges = [("x", "y"), ("b", "c"), ("a", "b"), ("c", "d"), ("ab", "c"), ("a", "bc"), ("ab", "cd"), ("abc", "d")]
    backend = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges, ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(entries) - 1)])]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path / "source")
    texts = [["abcd", "word"][i % 2] for i in range(60)]
    made = prune(tmp_path, monkeypatch, "cut", texts, "--tokenizer", tmp_path / "source", "--vocab_size", 270)
    before, after, new_ids = read_pair(tmp_path / "source", made)
    assert {"abcd", "abc", "bc", "word"} <= after.get_vocab().keys()
    assert after.get_vocab().keys().isdisjoint({"xy", "ab", "cd"}) and after.chat_template is None
    assert after("abcd").input_ids[0] == after.bos_token_id == len(after) - 1
    assert count_same(before, after, new_ids, ["abcd", "xbcx", "abcde", "wordabcd", "abxy", "word word"]) == 5


def test_pruning_adds_our_template_to_chatml_without_one(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    made = prune(tmp_path, monkeypatch, "cut", TEXTS, "--tokenizer", tmp_path / "bare", "--vocab_size", 300)
    expected = train_tokenizer.CHAT_TEMPLATE.read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(made).chat_template == expected


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "no such tokenizer folder"),
        (models.WordLevel({"a": 0}, unk_token="a"), "is WordLevel; only byte-level BPE can be pruned"),
        (models.BPE({"a": 0, "b": 1}, []), "BPE, but not byte-level: 254 of 256 bytes have no entry"),
        (
            models.BPE({char: i for i, char in enumerate(byte_level_bpe.BYTE_CHARACTERS.values())}, []),
            "255 is too small: bytes and special tokens already take 256",
        ),
    ],
)
def test_tokenizers_that_cannot_be_pruned_are_named(model, message, tmp_path, monkeypatch):
    if model:
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        prune(tmp_path, monkeypatch, "cut", ["a"], "--tokenizer", tmp_path / "source", "--vocab_size", 255)
    assert not (tmp_path / "cut").exists()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_qwen_is_pruned_to_a_chinese_vocabulary(tmp_path, monkeypatch, capsys):
    file, qwen = DATA / "pretrain" / "wanjuan_zh_web_sample.jsonl.gz", DATA / "tokenizers" / "qwen2.5"
    options = ["--text_column", "content", "--vocab_size", 16384, "--output", tmp_path / "cut", "--tokenizer", qwen]
    run(prune_vocabulary, monkeypatch, "--files", file, *options)
    cost = re.search(r"\+(\d\.\d\d)% tokens", capsys.readouterr().out)
    assert float(cost[1]) < 5
    before, after, new_ids = read_pair(qwen, tmp_path / "cut")
    lines = [line for row in read_rows(file, ["content"]) for line in row.content.split("\n")]
    assert count_same(before, after, new_ids, lines) > len(lines) / 2
    text = "e\u0301 龘 👨‍👩‍👧‍👦 １２"  # composed by the normalizer, which pruning keeps
    assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
