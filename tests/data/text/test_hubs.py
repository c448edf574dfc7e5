"""The Hub, ModelScope and stores are read through their clients like local files, by preparation and conversion."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

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


class Replies(http.server.SimpleHTTPRequestHandler):
    def reply(self, body: object, status: int = 200, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Hub(Replies):
    """The endpoints of the Hugging Face Hub that its file system reads with, over a folder OWNER/NAME/FILE."""

    gated: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/api/datasets/"):
            return self.describe(
                path.removeprefix("/api/datasets/"), "recursive=True" in query or "recursive=true" in query
            )
        owner_name, file = path.removeprefix("/datasets/").split("/resolve/main/")
        if owner_name in self.gated:
            return self.reply(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        data = Path(self.directory, owner_name, file).read_bytes()
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.reply(data[start : end + 1], status=206)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        names = json.loads(body)["paths"]
        repository = Path(self.directory, self.path.removeprefix("/api/datasets/").split("/paths-info/")[0])
        self.reply([self.entry(repository, repository / name) for name in names if (repository / name).exists()])

    def describe(self, path: str, recursive: bool) -> None:
        owner, name, *rest = path.split("/")
        repository = Path(self.directory, owner, name)
        if not repository.is_dir():
            return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] != ["tree"]:
            return self.reply({"id": f"{owner}/{name}", "_id": "0", "sha": "0" * 40, "siblings": [], "tags": []})
        folder = repository.joinpath(*rest[2:])
        self.reply([self.entry(repository, each) for each in (folder.rglob("*") if recursive else folder.iterdir())])

    def entry(self, repository: Path, path: Path) -> dict:
        name = str(path.relative_to(repository))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "1" * 40, "size": 0}
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
        if path.suffix == ".parquet":  # large files are in LFS
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return entry


class ModelScope(Replies):
    """The endpoints of ModelScope that its package downloads with, over a folder OWNER/NAME/FILE."""

    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        owner, name, *rest = url.path.removeprefix("/api/v1/datasets/").split("/")
        repository = Path(self.directory, owner, name)
        if rest == ["repo"]:
            self.fetched.append(query["FilePath"])
            self.reply((repository / query["FilePath"]).read_bytes())
        elif rest == ["repo", "tree"] and (repository / query.get("Root", "")).is_dir():
            folder = repository / query.get("Root", "")
            files = [self.entry(repository, path) for path in folder.rglob("*") if path.is_file()]
            self.reply({"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            self.reply({"Code": 404, "Message": "no such thing", "Success": False}, 404)

    def entry(self, repository: Path, path: Path) -> dict:
        data = path.read_bytes()
        facts = {"Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
        return {"Path": str(path.relative_to(repository)), "Type": "blob"} | facts


@contextmanager
def serving(handler: type[Replies], folder: Path) -> Iterator[str]:
    """Yield the address of a server of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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


def use_endpoint(monkeypatch, address: str) -> None:
    """Set what `HF_ENDPOINT` sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


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
