"""Tests of tools/measure_tokenizer.py: figures, built-in texts, error messages."""

from pathlib import Path

import measure_tokenizer
import pytest
from conftest import ROOT
from tiny_tokenizer import run, train_tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.tokenizer import train_tokenizer

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_figures_and_files(folder, tmp_path, monkeypatch, capsys):
    text = write_jsonl(tmp_path / "zh.jsonl", ["春天到了，", "桃花"])
    options = ["--tokenizers", folder, "--texts", f"zh={text}", "--seconds", 0, "--output", tmp_path / "out"]
    run(measure_tokenizer, monkeypatch, *options)
    table = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = sum(len(tokenizer(part).input_ids) for part in ("春天到了，", "桃花"))
    assert f"| made | 400 | zh | {7 / count:.2f} | {21 / count:.2f} |" in table
    assert (tmp_path / "out" / "tokenizers.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "out" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["outputs/a/tokenizer", "outputs/b/tokenizer"], ["a", "b"]),
        (["outputs/quickstart/tokenizer/", "Qwen/Qwen3-0.6B"], ["quickstart", "Qwen3-0.6B"]),
        (["outputs/quickstart/tokenizer"], ["quickstart"]),
        (["x/a/v1", "x/a/v2", "x/b/v1"], ["a/v1", "a/v2", "b/v1"]),
        (["x/a/tokenizer/v1", "x/b/tokenizer/v1"], ["a", "b"]),
        (["mine"], ["mine"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_tokenizers_are_named_by_what_tells_them_apart(folders, names):
    assert measure_tokenizer.short_names(folders) == names


def test_four_texts_are_built_in(folder, monkeypatch, capsys):
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
def test_mistakes_are_named(arguments, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(measure_tokenizer, monkeypatch, *arguments)


@pytest.mark.slow
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
