"""The shard inspector counts what is there, finds what is damaged, and names the documents of a block."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from tiny_shards import Shard, write_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import tokenizer_fingerprint
from buddygpt.data.shards.trace import read_rows

SHARDS = [
    Shard("0.ds", "wiki", [1, 2, 3, 4, 7, 8, 100], "zh"),
    Shard("1.ds", "web", [50] * 5, "zh"),
    Shard("2.ds", "books", [25] * 3, "en"),
]


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    vocabulary = {"<end>": 0, "<pad>": 1} | {f"w{number}": number for number in range(2, 64)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def shards(tmp_path, tokenizer) -> Path:
    fingerprint = tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    return write_shards(tmp_path / "train", SHARDS, fingerprint, wiki=2, books=0.5)


def inspect(capsys, *words: object) -> str:
    capsys.readouterr()
    run("data/inspect_shards.py", *words)
    return capsys.readouterr().out


def test_statistics_are_those_of_the_shards(shards, tmp_path, capsys):
    told = inspect(capsys, shards, "--output", tmp_path / "lengths.png")
    assert "450 tokens (uint16), 15 documents, 2.00 bytes of text per token\nshards: 3, preparation runs: 1" in told
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in told.splitlines() if line.endswith("%")}
    assert rows == {  # 250, 250 and 37.5 tokens in an epoch
        ("wiki", "zh"): ["125", "7", "2.00", "2", "46.5%"],
        ("web", "zh"): ["250", "5", "2.00", "1", "46.5%"],
        ("books", "en"): ["75", "3", "2.00", "0.5", "7.0%"],
        ("all", "zh"): ["375", "12", "2.00", "1.33", "93.0%"],
        ("all", "en"): ["75", "3", "2.00", "0.5", "7.0%"],
    }
    bars = re.findall(r"^ +(\d+) - +(\d+) +(\d+)  ?(█*)$", told, re.MULTILINE)
    counts = {(int(low), int(high)): int(count) for low, high, count, _ in bars}
    assert counts == {(1, 1): 1, (2, 3): 2, (4, 7): 2, (8, 15): 1, (16, 31): 3, (32, 63): 5, (64, 127): 1}
    assert [len(bar) for *_, bar in bars] == [10, 20, 20, 10, 30, 50, 10]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_damaged_shard_is_named(shards, capsys):
    assert "all 3 shards are as they were written" in inspect(capsys, shards, "--verify")
    flip(shards / "0.ds", 5)
    os.truncate(shards / "1.ds.index", 16)
    (shards / "2.documents.parquet").unlink()
    with pytest.raises(UserError) as caught:
        run("data/inspect_shards.py", shards, "--verify")
    told = str(caught.value)
    assert told.startswith("3 of 3 shards are damaged: ") and "\n" not in told
    assert re.search(r"0\.ds was changed: its sha256 .*; \S+1\.ds\.index holds 16 bytes, but .* says 40; ", told)
    assert "2.documents.parquet is missing" in told


def test_every_file_next_to_the_tokens_is_hashed(shards):
    flip(shards / "0.ds", 5)
    flip(shards / "0.documents.parquet", 9)
    flip(shards / "1.ds.index", 0)  # one document is a token shorter, the next one longer
    (shards / "2.documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError) as caught:
        run("data/inspect_shards.py", shards, "--verify")
    damaged = re.findall(r"(\S+) was changed: its sha256 is not the one in manifest", str(caught.value))
    names = ["0.ds", "0.documents.parquet", "1.ds.index", "2.documents.parquet"]
    assert damaged == [str(shards / name) for name in names]
    assert str(caught.value).startswith("3 of 3 shards are damaged: ")


def test_a_block_is_traced_and_shown(shards, tokenizer, capsys):
    told = inspect(capsys, shards, "--block", 3, "--block_size", 36, "--tokenizer", tokenizer)  # 17 + 19 tokens
    assert re.findall(r"^(\S+), source (\S+), documents (\d+)-(\d+)$", told, re.MULTILINE) == [
        ("0.ds", "wiki", "6", "6"),
        ("1.ds", "web", "0", "0"),
    ]
    rows = re.findall(r"^ +(\d+) tokens  (\S+)  chars (\d+)  score (\S+)\n +'(.*)'$", told, re.MULTILINE)
    assert [row[:4] for row in rows] == [("17", "wiki.jsonl:7", "100", "0.75"), ("19", "web.jsonl:1", "50", "0")]
    tokens = np.concatenate([np.fromfile(shards / name, "<u2") for name in ("0.ds", "1.ds")])[108:144]
    words = ["<end>" if token == 0 else f"w{token}" for token in tokens]
    assert " ".join(row[4] for row in rows).split() == words


@pytest.mark.parametrize("first, last", [(0, 0), (2, 3), (3, 5), (0, 6), (6, 6)])
def test_rows_are_those_asked_for(shards, first, last):
    ids = [row["id"] for row in read_rows(shards / "0.documents.parquet", first, last)]  # three to a row group
    assert ids == [f"wiki.jsonl:{number + 1}" for number in range(first, last + 1)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--block", 12, "--block_size", 36], "there is no block 12: with 36 tokens each, there are blocks 0 to 11"),
        (["--block", 0, "--block_size", 0], "block_size is 0; use at least 1"),
        (["--block", 0, "--block_size", 451], "holds 450 tokens, less than one block of 451"),
        (["--block", 0, "--block_size", 36, "--tokenizer", "nowhere"], "cannot read a tokenizer from nowhere"),
    ],
)
def test_mistakes_are_named(shards, words, message):
    with pytest.raises(UserError, match=message):
        run("data/inspect_shards.py", shards, *words)


def test_another_folder_or_tokenizer_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="is not a folder of token shards"):
        run("data/inspect_shards.py", tmp_path)
    backend = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other .* is not the one that"):
        run("data/inspect_shards.py", shards, "--block", 0, "--block_size", 9, "--tokenizer", tmp_path / "other")
