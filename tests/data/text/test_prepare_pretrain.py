"""prepare_pretrain.py: shards contain the input text and nothing else, and every user error is reported."""

import csv
import gzip
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from buddygpt.cli.checkpoints import load_tokenizer, tokenizer_rules
from buddygpt.cli.errors import UserError
from buddygpt.data import prepare_pretrain
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import TokenShards, documents_file, tokenizer_fingerprint
from buddygpt.data.text import hold_out, readers
from buddygpt.data.text.mappers import normalize_lines
from buddygpt.data.text.tokenize import token_dtype

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|pad|>"]
TEXTS = [f"第{i}篇：春天到了，\n\n院子里的桃花开了。Document {i} of many." for i in range(60)]


def byte_tokenizer(folder: Path, extra: int = 0) -> Path:
    """Save a tokenizer of 256 bytes, `<tool_call>` (not marked special, as in Qwen), two spaces, and extra entries."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<unused{i}>" for i in range(extra))]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool_call>", "  "])
    template = "  {{ messages }}<tool_call>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=template
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer")


@pytest.fixture
def prepare(tmp_path, tokenizer_folder, monkeypatch):
    """Return a function that runs the script with an output folder in tmp_path and returns that folder."""

    def call(*arguments, output="out", **options) -> Path:
        options = {"tokenizer": tokenizer_folder, "output": tmp_path / output} | options
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["prepare_pretrain.py", *map(str, [*words, *arguments])])
        prepare_pretrain.main()
        return tmp_path / output

    return call


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    rows = [json.dumps({key: text, "metadata": 3}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(rows), encoding="utf-8", newline="")
    return path


def documents(folder: Path, tokenizer) -> list[str]:
    """Split the shards at the ends in their index, and check that separators are there and nowhere else."""
    shards, texts = TokenShards(folder), []
    for shard in shards.shards:
        tokens = np.fromfile(folder / shard["file"], shards.dtype)
        ends = np.fromfile(folder / (shard["file"] + ".index"), "<u8")
        assert np.flatnonzero(tokens == shards.eos_id).tolist() == (ends - 1).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            texts.append(tokenizer.decode(tokens[start : end - 1]))
    return texts


def held_out(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "eval.jsonl").read_text("utf-8").split("\n") if line]


def write_as(kind: str, path: Path, texts: list[str]) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    elif kind == "array.json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "lines.json", "array.json", "parquet", "csv", "txt.gz"])
def test_every_format_gives_the_same_documents(kind, tmp_path, prepare, tokenizer_folder):
    texts = ["一，二\u2028三", "长" * 200_000, 'a "quoted", b']
    write_as(kind, tmp_path / f"in.{kind}", texts)
    out = prepare(sources=tmp_path / f"in.{kind}", txt_sample_by="line")
    assert sorted(documents(out / "train", AutoTokenizer.from_pretrained(tokenizer_folder))) == sorted(texts)
    assert not (out / "eval").exists()


@pytest.mark.slow
def test_a_txt_file_is_one_document(tmp_path, prepare, tokenizer_folder):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    out = prepare(sources=tmp_path / "a.txt")
    assert documents(out / "train", AutoTokenizer.from_pretrained(tokenizer_folder)) == ["one\n\ntwo"]


@pytest.mark.slow
def test_five_novels_are_five_documents_and_too_few_to_hold_out_is_said_early(tmp_path, prepare, monkeypatch):
    (tmp_path / "novels").mkdir()
    for number in range(5):
        chapters = [f"第{n}章 {number}\r\n\r\n{'春天到了，院子里的桃花开了。' * 50}{n}\r\n" for n in range(20)]
        (tmp_path / "novels" / f"{number}.txt").write_text("".join(chapters), encoding="utf-8")
    novels = {"sources": tmp_path / "novels"}
    assert TokenShards(prepare(**novels) / "train").documents == 5

    def refuse(*_: object) -> None:
        raise AssertionError("tokenizing has begun")

    again = {"output": tmp_path / "again", "eval_fraction": 0.02, "deduplicate": "exact"}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_pretrain.ShardWriter, "run", refuse)
        with pytest.raises(UserError, match="holds out none of 5 documents; raise it, or split long .txt files with"):
            prepare(**novels, **again)
        patch.setattr(hold_out, "is_held_out", lambda text, fraction: True)
        with pytest.raises(UserError, match="holds out all of 5 documents; lower it"):
            prepare(**novels, **again)
    out = prepare(**novels, **again, txt_separator="(?=第.{1,3}章)")
    manifests = [TokenShards(out / split) for split in ("train", "eval")]
    assert sum(each.documents for each in manifests) == 100 and manifests[1].documents


@pytest.mark.slow
def test_the_manifest_counts_every_row_and_byte(tmp_path, prepare, tokenizer_folder):
    rows = [*TEXTS, "", "\x00 \n", "短"]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with open(source, "a", encoding="utf-8") as file:
        file.write('\n{"text": null}\n{"text": 3}\n{"other": ""}\n{"text"\n')
    profile = tmp_path / "longer.yaml"
    profile.write_text("steps: [normalize_lines, {text_length: {min: 2}}]")
    out = prepare(sources=source, clean=profile, eval_fraction=0.2, on_bad_row="skip")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    train, evaluation = TokenShards(out / "train"), TokenShards(out / "eval")
    kept, aside = documents(out / "train", tokenizer), documents(out / "eval", tokenizer)
    assert sorted(kept + aside) == sorted(TEXTS) and 0 < len(aside) < 30
    assert sorted(aside) == sorted(held_out(out))
    counts = {"read": 67, "dropped_empty": 3, "dropped_text_length_below": 1, "dropped_bad_row": 3}
    counts |= {"dropped_held_out": len(aside), "written": len(kept)}
    assert train.manifest["cleaning"]["a"].items() >= counts.items()
    for shards, texts in ((train, kept), (evaluation, aside)):
        size = sum(len(text.encode()) for text in texts)
        assert (shards.documents, shards.text_bytes, shards.tokens) == (len(texts), size, size + len(texts))
        shards.verify()
        shards.check_tokenizer(tokenizer)
    (shard,) = train.shards
    assert shard["source"] == "a" and train.manifest["sources"][0]["tokens"] == train.tokens
    assert train.manifest["dtype"] == "uint16" and train.eos_id == 0 and train.manifest["vocab_size"] == 261


@pytest.mark.slow
def test_special_tokens_in_a_text_stay_text(tmp_path, prepare, tokenizer_folder):
    texts = ["a<|endoftext|>b", "<|im_end|>", "<tool_call>{}"]
    out = prepare(sources=write_jsonl(tmp_path / "a.jsonl", texts))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert sorted(documents(out / "train", tokenizer)) == sorted(texts)
    assert TokenShards(out / "train").tokens == sum(map(len, texts)) + len(texts)


@pytest.mark.slow
def test_added_tokens_for_plain_text_are_used(tmp_path, prepare):
    out = prepare(sources=write_jsonl(tmp_path / "a.jsonl", ["a  b"]))
    assert TokenShards(out / "train").tokens == len(["a", "  ", "b", "<|endoftext|>"])


@pytest.mark.slow
def test_held_out_documents_depend_on_their_text_alone(tmp_path, prepare, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for i in range(3):
        write_jsonl(tmp_path / f"part{i}.jsonl", TEXTS[i::3] + TEXTS[:5])
    one = write_jsonl(tmp_path / "one.jsonl", TEXTS[::-1])
    several = prepare(sources=tmp_path / "part*.jsonl", eval_fraction=0.3, workers=2, output="several")
    serial = prepare(sources=tmp_path / "part*.jsonl", eval_fraction=0.3, output="serial")
    whole = prepare(sources=one, eval_fraction=0.3, output="whole")
    two_tasks = prepare(sources=tmp_path / "part*.jsonl", eval_fraction=0.3, tasks=2, output="two_tasks")
    aside = set(held_out(whole))
    for out in (several, serial, two_tasks):
        assert set(held_out(out)) == aside == set(documents(out / "eval", tokenizer))
        assert set(documents(out / "train", tokenizer)) == set(TEXTS) - aside
    assert len(TokenShards(several / "train").shards) == 3 and len(TokenShards(two_tasks / "train").shards) == 2
    assert [s["sha256"] for s in TokenShards(several / "train").shards] == [
        s["sha256"] for s in TokenShards(serial / "train").shards
    ]


@pytest.mark.slow
def test_a_file_without_remaining_documents_gets_no_shard(tmp_path, prepare):
    write_jsonl(tmp_path / "a.jsonl", [""])
    write_jsonl(tmp_path / "b.jsonl", ["text"])
    out = prepare(sources=tmp_path / "?.jsonl")
    (shard,) = TokenShards(out / "train").shards
    assert pq.read_table(out / "train" / documents_file(shard))["id"].to_pylist() == [f"{tmp_path / 'b.jsonl'}:1"]
    assert len(list((out / "train").iterdir())) == 4


@pytest.mark.parametrize("entries, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_the_width_of_a_token_depends_on_the_largest_id(entries, dtype):
    assert token_dtype({str(i): i for i in range(entries)}).name == dtype


def test_gaps_in_the_ids_do_not_make_tokens_narrow():
    assert token_dtype({"a": 0, "b": 70_000}).name == "uint32"


@pytest.mark.slow
def test_wide_tokens_are_written_and_read(tmp_path, prepare):
    folder = byte_tokenizer(tmp_path / "wide", extra=70_000)
    out = prepare(sources=write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=folder)
    assert TokenShards(out / "train").dtype == np.dtype("<u4")
    assert sorted(documents(out / "train", AutoTokenizer.from_pretrained(folder))) == sorted(TEXTS)


@needs_data
def test_real_text_decodes_to_itself_with_the_qwen_tokenizer(prepare, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    qwen = DATA / "tokenizers" / "qwen2.5"
    files = ["wikipedia_cn_sample.json", "zh_industrycorpus_sample.parquet", "en_tinyshakespeare.txt"]
    sources = [DATA / "pretrain" / name for name in files]
    out = prepare("--text_key", "text", "completion", "--sources", *sources, tokenizer=qwen, eval_fraction=0.05)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    shards = TokenShards(out / "train")
    assert shards.manifest["dtype"] == "uint32" and shards.eos_id == 151643
    shards.check_tokenizer(tokenizer)
    raw = [row["completion"] for row in json.loads(sources[0].read_text("utf-8"))]
    raw += [*pq.read_table(sources[1], columns=["text"])["text"].to_pylist(), sources[2].read_text("utf-8")]
    normalized = tokenizer.backend_tokenizer.normalizer.normalize_str  # Qwen's own NFC
    expected = sorted(normalized(normalize_lines(text)) for text in raw)
    assert sorted(documents(out / "train", tokenizer) + documents(out / "eval", tokenizer)) == expected


@needs_data
def test_two_thousand_tang_poems_decode_to_themselves(tmp_path, prepare, tokenizer_folder):
    with gzip.open(DATA / "pretrain" / "zh_tang_poems.jsonl.gz", "rb") as file:
        lines = [next(file) for _ in range(2000)]
    (tmp_path / "tang.jsonl").write_bytes(b"".join(lines))
    out = prepare(sources=tmp_path / "tang.jsonl", shuffle_seed="null")
    expected = [normalize_lines(json.loads(line)["text"]) for line in lines]
    assert documents(out / "train", AutoTokenizer.from_pretrained(tokenizer_folder)) == expected


@pytest.mark.slow
def test_a_finished_folder_is_kept_or_the_change_is_reported(tmp_path, prepare, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = prepare(sources=source)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    source.touch()
    prepare(sources=source, workers=2)
    assert "already made" in capsys.readouterr().out
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match="out was made with other on_bad_row, eval_fraction. Delete it"):
        prepare(sources=source, on_bad_row="skip", eval_fraction=0.1)
    write_jsonl(source, TEXTS[1:])
    with pytest.raises(UserError, match="out was made with other inputs"):
        prepare(sources=source)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists and is no folder of shards"):
        prepare(sources=source, output="mine")


@pytest.mark.slow
def test_a_stopped_run_resumes_and_another_config_starts_from_scratch(tmp_path, prepare, capsys, monkeypatch):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS)
    read_rows, read = readers.read_rows, []

    def fail_at_b(path, *rest):
        for row in read_rows(path, *rest):
            if path.name == "b.jsonl" and row.number == 30:
                raise KeyboardInterrupt
            yield row

    def remember(path, *rest):
        read.append(path.name)
        return read_rows(path, *rest)

    for options in ({}, {"eval_fraction": 0.5}):
        monkeypatch.setattr(readers, "read_rows", fail_at_b)
        with pytest.raises(KeyboardInterrupt):
            prepare(sources=tmp_path / "?.jsonl", tasks=2, output=f"out{len(options)}")
        assert not (tmp_path / f"out{len(options)}").exists()
        monkeypatch.setattr(readers, "read_rows", remember)
        out = prepare(sources=tmp_path / "?.jsonl", tasks=2, output=f"out{len(options)}", **options)
        assert not out.with_name(f"{out.name}.partial").exists()
    assert read == ["b.jsonl", "a.jsonl", "b.jsonl"]
    printed = capsys.readouterr().out
    assert "resuming in" in printed and "starting from scratch" in printed
    assert TokenShards(tmp_path / "out0" / "train").documents == 120
    assert TokenShards(out / "train").documents + TokenShards(out / "eval").documents == 120


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, r"a\.jsonl:2: not valid JSON: .* Fix it, or set `on_bad_row"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, r"a\.jsonl:2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', {}, r"a\.jsonl:2: no column `text`; there are: texts"),
        ("a.jsonl", b'{"text": ["a"]}\n', {}, r"a\.jsonl:1: column `text` holds list, not text"),
        ("a.jsonl", b'"a"\n', {}, r"a\.jsonl:1: the row is not an object but str"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, r"a\.jsonl:1: column `text` holds half a surrogate pair"),
        ("a.csv", b"id,text\n1,a, b\n", {}, r"a\.csv:2: the row is longer than the header"),
        ("a.json", b'[{"text": "a"}, 3]', {}, r"a\.json:2: the row is not an object but int"),
        ("a.json", b'[{"text": "a"}', {}, r"a\.json: cannot be read: row 1: not valid JSON"),
        ("a.csv", b"id,body\n1,a\n", {}, r"a\.csv: cannot be read: no column `text`; there are: id, body"),
        ("a.csv", b"id,text\n1,a\n2\n", {}, r"a\.csv:3: the row ends before column `text`"),
        ("a.csv", b"text,id\na,1\n\xff,2\n", {}, r"a\.csv:3: not valid UTF-8"),
        ("a.txt", b"a\n\xff\n", {}, r"a\.txt:2: not valid UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], {}, r"a\.jsonl\.gz.*: cannot be read"),
        ("a.parquet", b"PAR1", {}, r"a\.parquet: cannot be read"),
        ("a.docx", b"a", {}, r"a\.docx: unknown type; use one of \.jsonl"),
        ("a.jsonl", b'{"text": ""}\n', {}, r"no document is left to train on .*'dropped_empty': 1"),
        ("a.jsonl", b"", {}, "no document is left to train on"),
        ("a.jsonl", b'{"text": "a"}\n', {"eval_fraction": 1e-9}, "holds out none of 1 documents"),
        ("a.jsonl", b'{"text": "a"}\n', {"eval_fraction": 2}, "eval_fraction is 2.0; use a number from 0"),
        ("a.txt", b"a", {"txt_separator": "(="}, r"txt_separator is `\(=`, no regular expression: missing \)"),
        ("a.txt", b"a", {"txt_sample_by": "word"}, "txt_sample_by"),
        ("a.jsonl", b'{"text": "a"}\n', {"workers": 0}, "workers is 0; use at least 1"),
        ("a.jsonl", b'{"text": "a"}\n', {"on_bad_row": "drop"}, "on_bad_row"),
        (
            "a.jsonl",
            b'{"text": "a"}\n',
            {"shard_byte": 3},
            "unknown argument `--shard_byte`; did you mean `shard_bytes`",
        ),
        ("a.jsonl", b'{"text": "a"}\n', {"sources": "nowhere/*"}, r"no file matches `nowhere/\*`"),
        ("a.jsonl", b'{"text": "a"}\n', {"tokenizer": "nowhere"}, "cannot read a tokenizer from nowhere"),
        ("a.jsonl", b'{"text": "a"}\n', {"tokenizer": "./none"}, "no such tokenizer folder: ./none"),
        ("a.jsonl", b'{"text": "a"}\n', {"document_separator": "<end>"}, "`<end>` is no special token of"),
        ("a.jsonl", b'{"text": "a"}\n', {"document_separator": "a"}, "`a` is no special token of"),
        ("a.csv", b'text,id\n"a\n\n\xff\n",2\n', {}, r"a\.csv:4: not valid UTF-8"),
    ],
)
def test_mistakes_are_reported_and_leave_no_output(name, content, options, message, tmp_path, prepare):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(**({"sources": tmp_path / name} | options))
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_without_the_column_is_reported(tmp_path, prepare):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: no column `text`; there are: body"):
        prepare(sources=tmp_path / "a.parquet")


@pytest.mark.slow
def test_a_mistake_in_a_worker_is_one_line_and_status_2(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text("[1]\n")
    config = {
        "sources": [str(tmp_path / "*.jsonl")],
        "tokenizer": str(tokenizer_folder),
        "workers": 2,
        "text_key": "text",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"output": str(tmp_path / "out")}))
    command = [sys.executable, ROOT / "data" / "prepare_pretrain.py", "--config", tmp_path / "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(
        f"error: {tmp_path / 'b.jsonl'}:1: the row is not an object but int. Fix it, or set `on_bad_row: skip`."
    )


@pytest.fixture
def shards(tmp_path, prepare) -> Path:
    """Three shards, in the order of the files, with documents of 3 to 12 tokens."""
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", [chr(97 + part * 5 + i) * (2 + 3 * i) for i in range(4)])
    return prepare(sources=tmp_path / "?.jsonl", shuffle_seed="null") / "train"


def concatenated(folder: Path) -> np.ndarray:
    return np.concatenate([np.fromfile(folder / s["file"], "<u2") for s in TokenShards(folder).shards])


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 7, 31, 50, 90])
def test_blocks_are_the_shards_cut_to_length(shards, block_size):
    tokens, blocks = concatenated(shards), BlockDataset(shards, block_size)
    assert len(blocks) == len(tokens) // block_size > 0
    for i in reversed(range(len(blocks))):
        block = blocks[i]
        assert block["input_ids"].tolist() == tokens[i * block_size : (i + 1) * block_size].tolist()
        assert block["input_ids"].dtype == torch.int64 and torch.equal(block["labels"], block["input_ids"])
        assert set(block) == {"input_ids", "labels"}
    for index in (len(blocks), -1):
        with pytest.raises(IndexError):
            blocks[index]


@pytest.mark.slow
def test_positions_restart_after_every_separator(shards):
    blocks = BlockDataset(shards, 20, isolate_documents=True)
    for block in blocks:
        position = -1
        for token, found in zip(block["input_ids"].tolist(), block["position_ids"].tolist(), strict=True):
            position += 1
            assert found == position
            if token == blocks.eos_id:
                position = -1


@pytest.mark.slow
def test_loader_workers_read_the_same_blocks(shards):
    blocks = pickle.loads(pickle.dumps(BlockDataset(shards, 16)))
    loader = torch.utils.data.DataLoader(blocks, batch_size=2, num_workers=2)
    read = torch.cat([batch["input_ids"].flatten() for batch in loader])
    assert read.tolist() == concatenated(shards)[: len(blocks) * 16].tolist()


@pytest.mark.slow
def test_a_damaged_folder_is_reported(shards):
    name = TokenShards(shards).shards[1]["file"]
    with pytest.raises(UserError, match="holds 90 tokens, less than one block of 91"):
        BlockDataset(shards, 91)
    data = (shards / name).read_bytes()
    (shards / name).write_bytes(data[:-1] + b"\x01")
    with pytest.raises(UserError, match=f"{name} was changed"):
        TokenShards(shards).verify()
    (shards / name).write_bytes(data[:-2])
    with pytest.raises(UserError, match=f"{name} holds {len(data) - 2} bytes, but .* says {len(data)}"):
        BlockDataset(shards, 8)
    (shards / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenShards(shards)
    manifest = shards / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(UserError, match="format_version is 2, this code reads 3"):
        TokenShards(shards)
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged or of another form"):
        TokenShards(shards)
    manifest.unlink()
    with pytest.raises(UserError, match="is not a folder of token shards: it has no manifest.json"):
        TokenShards(shards)


@pytest.mark.slow
def test_another_tokenizer_is_refused(shards, tmp_path, tokenizer_folder):
    other = AutoTokenizer.from_pretrained(byte_tokenizer(tmp_path / "other", extra=1))
    with pytest.raises(UserError, match=rf"tokenizer {tmp_path}/other \(.*made with, {tokenizer_folder} \("):
        TokenShards(shards).check_tokenizer(other)


def test_a_fingerprint_depends_on_content_not_on_files(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), sort_keys=True))
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    copy.add_tokens(["<new>"])
    assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(tokenizer)
    for part, other in {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.ByteLevel(True)}.items():
        changed = AutoTokenizer.from_pretrained(tokenizer_folder)
        setattr(changed.backend_tokenizer, part, other)
        assert tokenizer_fingerprint(changed) != tokenizer_fingerprint(tokenizer), part


def test_a_class_that_overrides_tokenizer_json_is_told_in_one_line(tmp_path, tokenizer_folder, capsys):
    load_tokenizer(str(tokenizer_folder))
    assert "warning" not in capsys.readouterr().err
    shutil.copytree(tokenizer_folder, tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "tokenizer.json"
    state = json.loads(file.read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    file.write_text(json.dumps(state))
    config = tmp_path / "gpt2" / "tokenizer_config.json"
    own = load_tokenizer(str(tmp_path / "gpt2"))
    assert "warning" not in capsys.readouterr().err
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    overridden = load_tokenizer(str(tmp_path / "gpt2"))
    assert "as GPT2Tokenizer, with other pre_tokenizer than in tokenizer.json" in capsys.readouterr().err
    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(overridden)


@pytest.mark.slow
def test_shards_with_an_older_hash_of_their_tokenizer_are_still_read(shards, tmp_path, tokenizer_folder):
    shutil.copytree(shards, tmp_path / "old")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rules = tokenizer_rules(tokenizer.backend_tokenizer.to_str())
    content = json.dumps([rules["vocab"], rules["merges"], rules["added"]], sort_keys=True)
    file = tmp_path / "old" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"tokenizer_sha256": hashlib.sha256(content.encode()).hexdigest()}
    file.write_text(json.dumps(manifest))
    TokenShards(tmp_path / "old").check_tokenizer(tokenizer)
