"""Does every public set become the text it holds, wherever it lies, and is every damaged file named?"""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buddygpt.data.text_files import find_files, progress_bar, read_rows
from buddygpt.data.text_readers import READERS, parse_upvotes
from buddygpt.data.text_sources import Source, SourceReader, describe_file, read_sources
from buddygpt.launch import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows in the form that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        array = path.suffix == ".json"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if array else "\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(source: Source, on_bad_row: str = "stop") -> tuple[list, dict]:
    """Return the documents of a source and the counts of its reader."""
    step = SourceReader([(source, source.files)], on_bad_row)
    documents = list(step.run())
    return documents, {key: value.total for key, value in step.stats.stats.items()}


def texts(entry: object) -> list[str]:
    (source,) = read_sources([entry])
    return [document.text for document in read(source)[0]]


ZHIHU = {"INSTRUCTION": "怎么选锅？", "RESPONSE": "看材质。", "SOURCE": "Zhihu"}
EXAM = {"id": "1", "q_main": "一加一等于几？", "option_a": "一", "option_b": "二", "option_e": ""}


@pytest.mark.parametrize(
    "reader, suffix, row, text, metadata",
    [
        ("ultra-fineweb", "parquet", {"content": "春", "score": "0.9", "source": "x"}, "春", {"score": 0.9}),
        ("firefly-pretrain", "jsonl", {"text": "夏"}, "夏", {}),
        ("chinese-fineweb-edu-v2", "parquet", {"text": "秋", "score": 0.7}, "秋", {"score": 0.7}),
        ("wikipedia", "parquet", {"id": "1", "url": "u", "title": "数学", "text": "数学是……"}, "数学\n\n数学是……", {}),
        ("wikipedia-cn-filtered", "json", {"completion": "条目", "source": "wikipedia.zh2307"}, "条目", {}),
        (
            "baidubaike",
            "jsonl",
            {"title": "茶", "summary": "饮料。", "sections": [{"title": "历史", "content": "很久。"}], "tags": ["a"]},
            "茶\n\n饮料。\n\n历史\n\n很久。",
            {},
        ),
        ("baidubaike", "jsonl", {"title": "茶", "summary": None, "sections": []}, "茶", {}),
        (
            "baike-qa",
            "jsonl",
            {"qid": "q", "category": "c", "title": "为何？", "desc": "", "answer": "因为。"},
            "为何？\n\n因为。",
            {},
        ),
        ("baike-qa", "jsonl", {"title": "为何？", "desc": "为何？", "answer": "因为。"}, "为何？\n\n因为。", {}),
        (
            "baike-qa",
            "jsonl",
            {"title": "为何？", "desc": "想知道", "answer": "因为。"},
            "为何？\n\n想知道\n\n因为。",
            {},
        ),
        (
            "zhihu-kol",
            "parquet",
            ZHIHU | {"METADATA": '{"upvotes": "赞同 15"}'},
            "怎么选锅？\n\n看材质。",
            {"upvotes": 15},
        ),
        ("skypile", "jsonl", {"text": "冬"}, "冬", {}),
        ("seq-monkey", "jsonl", {"text": "猴"}, "猴", {}),
        ("wanjuan", "jsonl", {"id": "BkM", "content": "网页"}, "网页", {}),
        (
            "wanjuan",
            "jsonl",
            EXAM | {"std_ans": "B", "answer_detail": "数一数。"},
            "一加一等于几？\nA. 一\nB. 二\n\n答案：B\n\n解析：数一数。",
            {},
        ),
        ("wanjuan", "jsonl", {"q_main": "写一首诗。", "std_ans": None}, "写一首诗。", {}),
        (
            "starcoderdata",
            "parquet",
            {
                "max_stars_repo_path": "a.py",
                "max_stars_repo_name": "o/r",
                "max_stars_count": 3,
                "id": "0",
                "content": "x=1",
            },
            "x=1",
            {"stars": 3, "repo": "o/r", "path": "a.py"},
        ),
        (
            "starcoderdata",
            "jsonl",
            {"max_stars_count": None, "content": "<reponame>o/r<filename>a.py<gh_stars>0\n<html>"},
            "<html>",
            {"stars": 0},
        ),
        (
            "industrycorpus2",
            "parquet",
            {"text": "酒店", "quality_score": 4.5, "perplexity": None, "num_words": 7, "industry_type": "住宿"},
            "酒店",
            {"quality_score": 4.5, "num_words": 7},
        ),
        ("chinese-instruct", "jsonl", {"id": "1", "prompt": "问", "response": "答"}, "问\n\n答", {}),
        ("belle", "json", {"instruction": "译", "input": "cat", "output": "猫"}, "译\n\ncat\n\n猫", {}),
        ("belle", "jsonl", {"instruction": "译", "input": "", "output": "猫"}, "译\n\n猫", {}),
        ("minimind", "jsonl", {"text": "小"}, "小", {}),
    ],
)
def test_a_row_of_every_set_becomes_its_text(reader, suffix, row, text, metadata, tmp_path):
    path = write_rows(tmp_path / f"rows.{suffix}", [row])
    (source,) = read_sources([{"reader": reader, "path": str(path)}])
    (document,), counts = read(source)
    assert document.text == text
    assert document.metadata == {"source": reader} | metadata
    assert document.id == f"{path}:1" and counts == {"read": 1}


def test_every_reader_is_in_the_table_of_sources_with_its_place():
    table = (Path(__file__).parents[1] / "data" / "sources.md").read_text("utf-8")
    for reader in READERS.values():
        assert f"| `{reader.name}` |" in table and reader.hub in table


@pytest.mark.parametrize(
    "label, votes",
    [
        ("赞同 15", 15),
        ("赞同", 0),
        ("赞同 1.2 万", 12_000),
        ("赞同 1.2万", 12_000),
        ("赞同 1,234", 1234),
        ("2.5K", 2500),
    ],
)
def test_upvotes_are_read_as_zhihu_writes_them(label, votes):
    assert parse_upvotes(label) == votes


@pytest.mark.parametrize(
    "reader, rows, option, kept, rule",
    [
        (
            "ultra-fineweb",
            [{"content": str(s), "score": s} for s in ("0.9", "0.85", "0.84", "nan")],
            "min_score",
            2,
            "score",
        ),
        ("chinese-fineweb-edu-v2", [{"text": str(s), "score": s} for s in (0.9, 0.85, 0.2)], "min_score", 2, "score"),
        ("starcoderdata", [{"content": "a", "max_stars_count": s} for s in (None, 0, 1, 9)], "min_stars", 2, "stars"),
        (
            "zhihu-kol",
            [ZHIHU | {"METADATA": {"upvotes": s}} for s in ("赞同", "赞同 1 万")],
            "min_upvotes",
            1,
            "upvotes",
        ),
        ("industrycorpus2", [{"text": "a", "quality_score": s} for s in (4.9, 0)], "min_quality", 1, "quality_score"),
        ("columns", [{"text": "a", "score": s, "n": 1} for s in (4.9, "0.1")], "min_score", 1, "score"),
    ],
)
def test_rows_below_a_threshold_are_counted_and_handed_to_the_exclusion_writer(
    reader, rows, option, kept, rule, tmp_path
):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (source,) = read_sources([{"reader": reader, "path": str(path), option: 0.85}])
    writer = mock.MagicMock()
    step = SourceReader([(source, source.files)], "stop", exclusion_writer=writer)
    assert len(list(step.run())) == kept
    dropped = len(rows) - kept
    counts = {key: value.total for key, value in step.stats.stats.items()}
    assert counts == {"read": len(rows), f"dropped_low_{rule}": dropped}
    reasons = [call.args[0].metadata["filter_reason"] for call in writer.write.call_args_list]
    assert reasons == [f"low_{rule}"] * dropped


def test_languages_are_folders_of_code(tmp_path):
    for folder in ("python", "java", "go"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "train-0.jsonl", [{"content": folder}])
    entry = {"reader": "starcoderdata", "path": str(tmp_path / "*" / "*.jsonl")}
    assert sorted(texts(entry | {"languages": ["python", "go"]})) == ["go", "python"]
    with pytest.raises(UserError, match=r"entry 1: languages: no folder `rust`; there are: go, java, python"):
        read_sources([entry | {"languages": "rust"}])


def test_entries_become_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.jsonl", "b/x.jsonl", "web/y.jsonl", "web/deep/z.csv", "web/.cache/w.jsonl", "web/README.md"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("text\n")
    entries = [
        "a/x.jsonl",
        "b/*.jsonl",
        {"path": "web", "language": "zh", "epochs": 2, "weight": 1, "clean": "zh-web"},
    ]
    first, second, web = read_sources(entries, clean="none", text_key=["content", "text"], txt_sample_by="line")
    assert (first.name, second.name, web.name) == ("x", "b", "web")
    assert web.files == ("web/deep/z.csv", "web/y.jsonl")
    assert (web.language, web.epochs, web.weight, web.clean) == ("zh", 2.0, 1.0, "zh-web")
    assert first == Source("x", ("a/x.jsonl",), clean="none", text_key=("content", "text"), txt_sample_by="line")
    assert [source.name for source in read_sources(["a/x.jsonl", "b/x.jsonl"])] == ["x", "x-2"]
    named = {"reader": "ultra-fineweb", "path": "a/x.jsonl"}
    assert read_sources([named])[0].language is None, "the set has two languages"
    assert read_sources([named | {"reader": "skypile"}], text_key=["body"])[0].text_key == ("text",)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"reader": "wikipedai"}, "entry 1: there is no reader `wikipedai`; use one of columns, ultra-fineweb"),
        ({"reader": ["wikipedia"]}, "there is no reader"),
        ({"path": "x.jsonl", "epoch": 2}, "reader `columns` takes no key `epoch`; it takes: reader, path"),
        ({"reader": "wikipedia", "min_score": 1}, "reader `wikipedia` takes no key `min_score`"),
        ({"reader": "wikipedia", "text_key": "a"}, "reader `wikipedia` takes no key `text_key`"),
        ({"path": "x.jsonl", "languages": ["go"]}, "reader `columns` takes no key `languages`"),
        ({"path": "x.jsonl", "epochs": 0}, "epochs is `0`; use a number above 0"),
        ({"path": "x.jsonl", "weight": "1"}, "weight is `1`; use a number above 0"),
        ({"path": "x.jsonl", "min_score": float("nan")}, "min_score is `nan`; use a number"),
        ({"path": "x.jsonl", "txt_sample_by": "word"}, "txt_sample_by is `word`; use document or line"),
        ({"path": "x.jsonl", "name": "a/b"}, "name is `a/b`; use letters"),
        ({"path": []}, r"path is `\[\]`; use a path"),
        ({}, "reader `columns` knows no place on the Hub; name the files as `path`"),
        ({"reader": "wanjuan"}, "reader `wanjuan` knows no place on the Hub"),
        ({"reader": "wikipedia", "language": "fr"}, "reader `wikipedia` knows zh, en on the Hub; for others name a"),
        (3, "`3` is neither a path nor a mapping"),
        ("nowhere/*.jsonl", "no file matches `nowhere/"),
        ("memory://nowhere/*.jsonl", "no file matches `memory://nowhere/"),
        ("nosuch://x", "nosuch://x: cannot be read: Protocol not known: nosuch"),
    ],
)
def test_a_mistake_in_an_entry_is_named(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=message):
        read_sources([entry])


def test_a_name_or_a_file_that_occurs_twice_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="entry 2: another source is called `n`; give each its own `name`"):
        read_sources([{"path": f"{name}.jsonl", "name": "n"} for name in "ab"])
    with pytest.raises(UserError, match=r"a\.jsonl is in source `a` and in `tmp`; `epochs` repeats one"):
        read_sources(["a.jsonl", {"name": "tmp", "path": "*.jsonl"}])


@pytest.mark.parametrize(
    "reader, row, message",
    [
        ("wikipedia", {"text": "a"}, r"x\.jsonl:1: no column `title`; there are: text"),
        ("baidubaike", {"title": "a", "sections": "b"}, r"x\.jsonl:1: not a row of `baidubaike`"),
        ("baike-qa", {"title": 3, "answer": "b"}, r"x\.jsonl:1: not a row of `baike-qa`"),
        ("zhihu-kol", ZHIHU | {"METADATA": "{"}, r"x\.jsonl:1: Expecting property name"),
        ("wanjuan", {"content": ["a"]}, r"x\.jsonl:1: the text holds list, not text"),
        ("columns", {"text": "a", "score": "high"}, r"x\.jsonl:1: `score` has a minimum, and is no number here"),
        ("columns", {"text": "a"}, r"x\.jsonl:1: `score` has a minimum, and is no number here"),
    ],
)
def test_a_row_of_another_form_stops_the_run_or_is_counted(reader, row, message, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row, {}])
    entry = {"reader": reader, "path": str(path)} | ({"min_score": 1} if reader == "columns" else {})
    (source,) = read_sources([entry])
    with pytest.raises(UserError, match=f"{message}.* Mend it, or set `on_bad_row: skip`"):
        read(source)
    documents, counts = read(source, on_bad_row="skip")
    assert counts == {"read": 2, "dropped_bad_row": 1} and [document.text for document in documents] == [""]


# Damaged and unusual files.

GB = "春天到了，院子里的桃花开了。"


def rows_of(path: Path, data: bytes, **options) -> list:
    path.write_bytes(data)
    return list(read_rows(path, ["text"], **options))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_gb18030_is_recognised_and_damaged_utf8_is_not_taken_for_it(name, tmp_path):
    wrap = {"a.jsonl": '{"text": "%s"}\n', "a.json": '[{"text": "%s"}]', "a.csv": "text\n%s\n", "a.txt": "%s"}[name]

    def error(data: bytes) -> str:
        try:
            return rows_of(tmp_path / name, data)[-1].error
        except UserError as error:  # an array cannot be read on
            return str(error)

    hint = "not valid UTF-8; it looks like GB18030: convert it with `iconv -f GB18030 -t UTF-8`"
    assert error((wrap % GB).encode("gb18030")).endswith(hint)
    for damaged in (
        (wrap % GB).encode().replace("桃".encode(), "桃".encode()[:2]),
        (wrap % "caf\xe9 na\xefve").encode("latin-1"),
    ):
        assert error(damaged).endswith("not valid UTF-8")


def test_gb18030_in_a_parquet_file_is_recognised(tmp_path):
    column = pa.array([GB.encode("gb18030")]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet", ["text"])
    assert "it looks like GB18030" in row.error


def test_utf16_is_recognised(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: it is UTF-16; convert it with `iconv -f UTF-16"):
        rows_of(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16"))


@pytest.mark.parametrize(
    "data, contents",
    [
        ('{"text": "a\u2028b\x85c"}\n{"text": "d"}', ["a\u2028b\x85c", "d"]),
        ('\ufeff{"text": "a"}\n', ["a"]),
        ('\ufeff[{"text": "a"}]', ["a"]),
        ('{"text": "a"}\r\n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
        ('{"text": "a\\u0000b"}\n', ["a\x00b"]),
        ("", []),
        ("[]", []),
        ("\n \n", ["", ""]),
    ],
)
def test_unusual_files_are_read(data, contents, tmp_path):
    for name in ("a.jsonl", "a.json"):
        assert [row.content for row in rows_of(tmp_path / name, data.encode())] == contents


@pytest.mark.parametrize(
    "name, data, number, message",
    [
        ("a.jsonl", b'{"text": "a\x00b"}\n', 1, "not valid JSON: Invalid control character"),
        ("a.jsonl", b'{"text": "a"}\n' + b"\x00" * 9 + b"\n", 2, "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', 2, "not valid JSON: Unexpected UTF-8 BOM"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', 1, "not valid JSON: Extra data"),
        ("a.jsonl", b"[" * 200_000 + b"\n", 1, "the row is no object|nested|recursion"),
        ("a.jsonl", b'{"text": ' + b"1" * 9999 + b"}\n", 1, "not valid JSON: Exceeds the limit"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', 2, "no column `text`; there are: body"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', 2, "no column `text`; there are: body"),
    ],
)
def test_a_bad_row_is_named_by_its_place(name, data, number, message, tmp_path):
    if data.startswith(b"[["):
        data = b'{"text": ' + data
    row = rows_of(tmp_path / name, data)[-1]
    assert row.number == number
    with pytest.raises(ValueError, match=message):
        raise ValueError(row.error)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.json", b'[{"text": "a"}, {"text": "b', r"a\.json:1: cannot be read: row 2: not valid JSON: Unterminated"),
        ("a.json", b'[{"text": "a"}, ', "row 2: not valid JSON: Expecting value"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": b}, ' + b'{"text": "c"}, ' * 9999,
            "row 2: not valid JSON: Expecting value",
        ),
        ("a.json", b'[{"text": "a"} {"text": "b"}]' + b" " * 99, "row 1: not valid JSON: Expecting ',' delimiter"),
        ("a.json", b"[" * 200_000, "row 1: not valid JSON: maximum recursion depth"),
        ("a.parquet", b"", r"a\.parquet: cannot be read: Parquet file size is 0 bytes"),
        ("a.csv", b"", r"a\.csv: cannot be read: no column `text`"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_on_is_one_line(name, data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name, data)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_files_are_read_whole_or_the_last_good_row_is_named(suffix, compress, tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(50_000))
    path = tmp_path / f"a.jsonl.{suffix}"
    assert len(rows_of(path, compress(lines) + compress(lines))) == 100_000, "several members, as pigz and cat make"
    assert rows_of(path, compress(b"")) == []
    path.write_bytes(compress(lines)[:-100])
    read_before = []
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}:\d+: cannot be read: ") as caught:
        read_before.extend(row.number for row in read_rows(path, ["text"]))
    assert 10_000 < len(read_before) < 50_000 and f":{len(read_before)}: cannot" in str(caught.value)


def peak_of(path: Path) -> int:
    tracemalloc.start()
    for _ in read_rows(path, ["text"]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_of_50_megabytes_is_read_in_memory_bounded_by_itself(name, tmp_path):
    text = "长" * 17_000_000
    write_rows(tmp_path / name, [{"text": "a"}, {"text": text}, {"text": "b"}])
    rows = list(read_rows(tmp_path / name, ["text"]))
    assert [len(row.content) for row in rows] == [1, len(text), 1]
    del rows
    assert peak_of(tmp_path / name) < 6 * (tmp_path / name).stat().st_size


def test_memory_for_a_json_array_does_not_grow_with_it(tmp_path):
    rows = [{"text": "春" * 1000}] * 2000
    small, large = write_rows(tmp_path / "small.json", rows), write_rows(tmp_path / "large.json", rows * 4)
    assert large.stat().st_size > 20e6
    assert peak_of(large) < 1.2 * peak_of(small) < 2e6


READ_PARQUET = """
import sys
from pathlib import Path
import pyarrow
from buddygpt.data.text_files import read_rows
assert sum(1 for _ in read_rows(Path(sys.argv[1]), ["text"]))
print(pyarrow.default_memory_pool().max_memory())
"""


def test_memory_for_a_parquet_file_does_not_grow_with_its_row_group(tmp_path):
    for name, count in (("small", 2000), ("large", 16_000)):
        texts = [hashlib.sha256(str(i).encode()).hexdigest() * 30 for i in range(count)]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=count, use_dictionary=False)
    peaks = []
    for name in ("small", "large"):
        command = [sys.executable, "-c", READ_PARQUET, str(tmp_path / f"{name}.parquet")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.5 * peaks[0] < 16e6


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
def test_a_bar_ends_at_the_size_of_the_file(codec, tmp_path):
    data = b'{"text": "a"}\n' * 9999
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[codec](data))
    with progress_bar([path], file=io.StringIO()) as bar:
        assert sum(1 for _ in read_rows(path, ["text"], bar)) == 9999
        assert bar.n == bar.total == path.stat().st_size


# Elsewhere than on this disk.


def test_urls_are_read_as_local_files_are(tmp_path):
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
    assert texts("memory://set/*/*.gz") == ["三"]
    described = describe_file("memory:///set/part.parquet")
    assert described["bytes"] == memory.size("/set/part.parquet") and described["sha256"].startswith("etag:")
    memory.pipe("/set/bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"memory:///set/bad\.jsonl\.gz:\d+: cannot be read"):
        texts("memory://set/bad.jsonl.gz")


class Hub(http.server.SimpleHTTPRequestHandler):
    """The endpoints of the Hugging Face Hub that its file system reads with, over a folder OWNER/NAME/FILE."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/api/datasets/"):
            return self.describe(
                path.removeprefix("/api/datasets/"), "recursive=True" in query or "recursive=true" in query
            )
        owner_name, file = path.removeprefix("/datasets/").split("/resolve/main/")
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

    def reply(self, body: object, status: int = 200, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


READ_FROM_HUB = """
import json, sys
from buddygpt.data.text_sources import SourceReader, describe_file, read_sources
from buddygpt.launch import UserError
code = {"reader": "starcoderdata", "languages": "go", "min_stars": 2}
wiki, code = sources = read_sources(["wikimedia/wikipedia", code])
documents = [[d.id, d.text] for s in sources for d in SourceReader([(s, s.files)], "stop").run()]
try:
    read_sources(["hf://datasets/nobody/nothing/*.parquet"])
except UserError as error:
    print(json.dumps([documents, [describe_file(f) for s in sources for f in s.files], wiki.language, str(error)]))
"""


def test_a_set_is_read_from_the_hub_by_its_name_alone(tmp_path):
    wiki = tmp_path / "wikimedia" / "wikipedia" / "20231101.zh"
    code = tmp_path / "bigcode" / "starcoderdata"
    for folder in (wiki, code / "go", code / "java"):
        folder.mkdir(parents=True)
    write_rows(wiki / "train-00000-of-00001.parquet", [{"id": "1", "url": "u", "title": "茶", "text": "一种饮料。"}])
    for language in ("go", "java"):
        rows = [{"content": f"{language} {stars}", "max_stars_count": stars} for stars in (1, 2)]
        write_rows(code / language / "train-0.parquet", rows)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", READ_FROM_HUB], capture_output=True, text=True, env=environment)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    documents, files, language, error = json.loads(done.stdout)
    wiki_url = "hf://datasets/wikimedia/wikipedia/20231101.zh/train-00000-of-00001.parquet"
    go_url = "hf://datasets/bigcode/starcoderdata/go/train-0.parquet"
    assert documents == [[f"{wiki_url}:1", "茶\n\n一种饮料。"], [f"{go_url}:2", "go 2"]] and language == "zh"
    data = (wiki / "train-00000-of-00001.parquet").read_bytes()
    assert files[0] == {"file": wiki_url, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert error.startswith("hf://datasets/nobody/nothing/*.parquet: cannot be read: ")


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(
        UserError, match=r"hf://datasets/wikimedia/wikipedia/20231101\.zh/\*\.parquet: cannot be read: "
    ):
        read_sources(["wikipedia"])  # the tests are offline


def test_modelscope_downloads_the_files_of_the_pattern(tmp_path, monkeypatch):
    import modelscope

    write_rows(tmp_path / "a.jsonl", [{"text": "春"}])
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "b.jsonl", [{"text": "夏"}])
    download = mock.create_autospec(modelscope.dataset_snapshot_download, return_value=str(tmp_path))
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", download)
    assert texts({"reader": "skypile", "path": "ms://Skywork/SkyPile-150B/data/*.jsonl"}) == ["夏"]
    download.assert_called_once_with("Skywork/SkyPile-150B", allow_patterns=["data/*.jsonl", "data/*.jsonl"])
    assert sorted(texts("ms://owner/name/**/*.jsonl")) == ["夏", "春"]
    assert sorted(texts("ms://owner/name")) == ["夏", "春"]


def test_find_files_takes_names_globs_and_folders(tmp_path):
    for name in ("a.jsonl", "b/c.txt.zst", "b/notes.md", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_files([str(tmp_path)]) == [tmp_path / "a.jsonl", tmp_path / "b" / "c.txt.zst"]
    assert find_files([str(tmp_path / "*")]) == [tmp_path / "a.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        find_files([str(tmp_path / ".git" / "*.jsonl")])


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
@pytest.mark.parametrize(
    "reader, file, rows",
    [
        ("wikipedia-cn-filtered", "pretrain/wikipedia_cn_sample.json", 158),
        ("wanjuan", "pretrain/wanjuan_zh_web_sample.jsonl.gz", 1000),
        ("industrycorpus2", "pretrain/zh_industrycorpus_sample.parquet", 100),
        ("belle", "sft/belle_2m_cn_sample.json", 598),
    ],
)
def test_real_samples_are_read_whole(reader, file, rows):
    (source,) = read_sources([{"reader": reader, "path": str(DATA / file)}])
    documents, counts = read(source)
    assert counts == {"read": rows} and all(document.text for document in documents)
    if reader == "industrycorpus2":
        assert {"quality_score", "perplexity", "num_words"} <= documents[0].metadata.keys()
