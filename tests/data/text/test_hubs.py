"""The Hub, ModelScope and stores are read through their clients like local files, by preparation and conversion."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_hubs import Hub, ModelScope, serving, use_endpoint

from buddygpt.cli.errors import UserError
from buddygpt.data import convert_chat
from buddygpt.data.text.hubs import describe_file
from buddygpt.data.text.readers import SourceReader
from buddygpt.data.text.sources import Source, read_sources


def read(source: Source) -> tuple[list, dict]:
    """Return the documents of a source and the counts of its reader."""
    step = SourceReader([(source, source.files)], "stop")
    return list(step.run()), step.counts.to_json()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def test_urls_are_read_as_local_files_are():
    memory = fsspec.filesystem("memory")
    table = pa.table({"text": ["一", "二"], "score": [1.0, 2.0], "html": ["<p>", "<p>"]})
    with memory.open("/set/part.parquet", "wb") as file:
        pq.write_table(table, file)
    memory.pipe("/set/deep/a.jsonl.gz", gzip.compress(b'{"text": "\xe4\xb8\x89", "score": 3}\n'))
    memory.pipe("/set/deep/b.jsonl.zst", zstd(b'{"text": "\xe5\x9b\x9b", "score": 4}\n'))
    memory.pipe("/set/.hidden/c.jsonl", b"{")
    memory.pipe("/set/README.md", b"{")
    (source,) = read_sources([{"path": "memory://set", "min_score": 2}])
    assert source.name == "set"
    assert source.files == (
        "memory:///set/deep/a.jsonl.gz",
        "memory:///set/deep/b.jsonl.zst",
        "memory:///set/part.parquet",
    )
    documents, counts = read(source)
    assert [document.text for document in documents] == ["三", "四", "二"]
    assert documents[-1].id == "memory:///set/part.parquet:2" and counts == {"read": 4, "dropped_low_score": 1}
    (glob,) = read_sources(["memory://set/*/*.gz"])
    assert glob.files == ("memory:///set/deep/a.jsonl.gz",)
    described = describe_file("memory:///set/part.parquet")
    assert described["bytes"] == memory.size("/set/part.parquet") and described["sha256"].startswith("etag:")
    memory.pipe("/set/bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"memory:///set/bad\.jsonl\.gz:\d+: cannot be read"):
        read(*read_sources(["memory://set/bad.jsonl.gz"]))


def answer(code: str, **environment: str) -> object:
    """Return what Python code prints as JSON; the clients read their environment when they are imported."""
    command, variables = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ_FROM_HUB = """
import json, sys
from buddygpt.data.text.readers import SourceReader
from buddygpt.data.text.hubs import describe_file
from buddygpt.data.text.sources import Source, read_sources
from buddygpt.cli.errors import UserError
code = {"reader": "starcoderdata", "languages": "go", "min_stars": 2}
wiki, code = sources = read_sources(["wikimedia/wikipedia", code])
documents = [[d.id, d.text] for s in sources for d in SourceReader([(s, s.files)], "stop").run()]
try:
    read_sources(["hf://datasets/nobody/nothing/*.parquet"])
except UserError as error:
    print(json.dumps([documents, [describe_file(f) for s in sources for f in s.files], wiki.language, str(error)]))
"""


@pytest.mark.slow
def test_a_set_is_read_from_the_hub_by_its_name_alone(tmp_path):
    wiki = tmp_path / "wikimedia" / "wikipedia" / "20231101.zh"
    code = tmp_path / "bigcode" / "starcoderdata"
    for folder in (wiki, code / "go", code / "java"):
        folder.mkdir(parents=True)
    article = {"id": "1", "url": "u", "title": "茶", "text": "一种饮料。"}
    pq.write_table(pa.Table.from_pylist([article]), wiki / "train-00000-of-00001.parquet")
    for language in ("go", "java"):
        rows = [{"content": f"{language} {stars}", "max_stars_count": stars} for stars in (1, 2)]
        pq.write_table(pa.Table.from_pylist(rows), code / language / "train-0.parquet")
    with serving(Hub, tmp_path) as address:
        documents, files, language, error = answer(READ_FROM_HUB, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    wiki_url = "hf://datasets/wikimedia/wikipedia/20231101.zh/train-00000-of-00001.parquet"
    go_url = "hf://datasets/bigcode/starcoderdata/go/train-0.parquet"
    assert documents == [[f"{wiki_url}:1", "茶\n\n一种饮料。"], [f"{go_url}:2", "go 2"]] and language == "zh"
    data = (wiki / "train-00000-of-00001.parquet").read_bytes()
    assert files[0] == {"file": wiki_url, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert error.startswith("hf://datasets/nobody/nothing/*.parquet: cannot be read: there is no such data set on the")


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(
        UserError, match=r"wikimedia/wikipedia/20231101\.zh/\*\.parquet: cannot be read: HF_HUB_OFFLINE is set"
    ):
        read_sources(["wikipedia"])  # the tests are offline


PAIR = {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR |= {"rejected": [PAIR["chosen"][0], {"role": "assistant", "content": "b"}]}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a Hub that the clients in this process use."""
    folder = tmp_path / "hub"
    for name in ("data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"):
        (folder / "h4" / "pairs" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([PAIR] * (3 if "train" in name else 2)), folder / "h4" / "pairs" / name)
    (folder / "h4" / "pairs" / "README.md").write_text("card")
    (folder / "zh" / "chats").mkdir(parents=True)
    (folder / "zh" / "chats" / "general.jsonl").write_text('{"prompt": "问", "response": "答"}\n' * 5, "utf-8")
    with serving(Hub, folder) as address:
        use_endpoint(monkeypatch, address)
        yield folder


def convert(monkeypatch, output: Path, *inputs: str, kind: str = "preference") -> list[dict]:
    monkeypatch.setattr("sys.argv", ["convert_chat.py", "--kind", kind, "--output", str(output), "--input", *inputs])
    convert_chat.main()
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("hf://h4/pairs", 5),
        ("hf://datasets/h4/pairs/data", 5),
        ("hf://h4/pairs/data/train_prefs-00000-of-00001.parquet", 3),
        ("hf://h4/pairs/**/test*.parquet", 2),
        ("hf://h4/pairs/train_prefs", 3),
    ],
)
def test_chat_rows_are_converted_from_the_hub(path, rows, hub, tmp_path, monkeypatch):
    written = convert(monkeypatch, tmp_path / "out.jsonl", path)
    assert len(written) == rows and written[0]["rejected"] == [{"role": "assistant", "content": "b"}]


def test_several_data_sets_of_the_hub_and_local_files_become_one(hub, tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    inputs = ["hf://zh/chats/general", "hf://zh/chats/*.jsonl", str(tmp_path / "own.jsonl")]
    written = convert(monkeypatch, tmp_path / "out.jsonl", *inputs, kind="sft")
    assert len(written) == 6 and written[0]["messages"][1] == {"role": "assistant", "content": "答"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "hf://h4/none",
            r"hf://datasets/h4/none: cannot be read: there is no such data set on the Hub; .*hf auth login",
        ),
        ("hf://h4/none/train", r"h4/none/train: cannot be read: there is no such data set on the Hub"),
        ("hf://h4/pairs/train", r"no file or split matches .*; there are: README.md, data/test_prefs-00000-of-00001"),
        ("hf://h4/pairs/*.csv", r"no file matches `hf://h4/pairs/\*\.csv`"),
        ("hf://h4", r"hf://h4: write hf://OWNER/NAME"),
        ("hf://zh/chats", r"general\.jsonl.*: cannot be read: it is gated: accept its terms .* `hf auth login`"),
    ],
)
def test_mistakes_with_the_hub_are_one_line(path, message, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "gated", ["zh/chats"])
    with pytest.raises(UserError, match=message) as raised:
        convert(monkeypatch, tmp_path / "out.jsonl", path)
    assert "\n" not in str(raised.value) and not (tmp_path / "out.jsonl").exists()


def test_a_hub_without_a_network_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match="cannot be read: it cannot be reached: check the network; HF_ENDPOINT"):
        convert(monkeypatch, tmp_path / "out.jsonl", "hf://h4/pairs")


READ_FROM_MODELSCOPE = """
import json
from pathlib import Path
from buddygpt.data.text.hubs import find_source_files
from buddygpt.cli.errors import UserError
def find(path):
    try:
        return [Path(file).read_text() for file in find_source_files(path)]
    except UserError as error:
        return str(error)
paths = ["tea/green/*.jsonl", "tea/green/cups", "tea/green/**/d.csv", "tea/green/data/train", "tea/green/*.parquet"]
paths += ["tea/black", "tea"]
print(json.dumps([find(f"ms://{path}") for path in paths]))
"""


@pytest.mark.slow
def test_modelscope_fetches_the_files_that_are_meant_and_no_others(tmp_path):
    for name in (
        "a.jsonl",
        "cups/b.jsonl",
        "cups/blue/c.csv",
        "pots/old/d.csv",
        "data/train-0-of-1.jsonl",
        "pots/e.jsonl",
    ):
        path = tmp_path / "tea" / "green" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    with serving(ModelScope, tmp_path) as address:
        found = answer(READ_FROM_MODELSCOPE, MODELSCOPE_ENDPOINT=address, MODELSCOPE_CACHE=str(tmp_path / "cache"))
    assert found[:3] == [["a.jsonl"], ["cups/b.jsonl", "cups/blue/c.csv"], ["pots/old/d.csv"]]
    assert found[3] == ["data/train-0-of-1.jsonl"]
    assert sorted(ModelScope.fetched) == sorted(sum(found[:4], []))
    assert found[4] == "no file matches `ms://tea/green/*.parquet`"
    assert found[5].startswith("ms://tea/black: cannot be read: there is no such data set on ModelScope; if it is")
    assert found[6] == "ms://tea: write ms://OWNER/NAME, or ms://OWNER/NAME/GLOB"
