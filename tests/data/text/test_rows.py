"""Tests of rows: unusual and damaged files are read or named with their line, in memory that does not grow."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import find_files
from buddygpt.data.text import lines
from buddygpt.data.text import rows as row_reader
from buddygpt.data.text.rows import progress_bar, read_rows

GB = "春天到了，院子里的桃花开了。"


def json_file(path: Path, rows: list[dict]) -> Path:
    """Write lines, or an array, as the suffix says."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")
    return path


def rows_of(path: Path, data: bytes, **options) -> list:
    path.write_bytes(data)
    return list(read_rows(path, ["text"], **options))


ENCODED = {
    "GB18030": GB,
    "BIG5": "春天到了，院子裡的桃花開了，孩子們在樹下讀書。",
    "BIG5-HKSCS": "嗰度好靜，啲人喺度睇書，佢哋冇嘢做，唔知點算。",
    "SHIFT_JIS": "吾輩は猫である。名前はまだ無い。",
    "EUC-JP": "どこで生れたかとんと見当がつかぬ。",
    "CP949": "똠방각하는 펲시콜라를 마신다.",
    "UTF-32LE": "春天到了，院子里的桃花开了。",
    "EUC-KR": "나는 고양이로소이다. 이름은 아직 없다.",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_encoding_is_told_and_damaged_utf8_is_not_taken_for_one(name, tmp_path):
    wrap = {"a.jsonl": '{"text": "%s"}\n', "a.json": '[{"text": "%s"}]', "a.csv": "text\n%s\n", "a.txt": "%s"}[name]

    def error(data: bytes) -> str:
        try:
            return rows_of(tmp_path / name, data)[-1].error
        except UserError as error:  # an array cannot be read on
            return str(error)

    for encoding, text in ENCODED.items():
        hint = f"{encoding}: convert it with `iconv -f {encoding} -t UTF-8`"
        if encoding != "UTF-32LE":
            hint = f"not valid UTF-8; it looks like {hint}"
        assert error((wrap % text).encode(encoding)).endswith(hint.replace("UTF-32LE: c", "UTF-32LE; c"))
    for encoding in ("UTF-16LE", "UTF-16BE"):  # without a byte order mark
        for text in (GB, "Latin text has a zero in every second byte"):
            message = error((wrap % text).encode(encoding))
            assert encoding in message and f"convert it with `iconv -f {encoding} -t UTF-8`" in message, text
    for damaged in (
        (wrap % GB).encode().replace("桃".encode(), "桃".encode()[:2]),
        (wrap % "caf\xe9 na\xefve").encode("latin-1"),
        (wrap % "Привет! Это обычный русский текст.").encode("cp1251"),
        (wrap % "“C’est l’été” — café naïve €100").encode("cp1252"),
    ):
        assert error(damaged).endswith("not valid UTF-8")


def test_gb18030_in_a_parquet_file_is_recognized(tmp_path):
    column = pa.array([GB.encode("gb18030")]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet", ["text"])
    assert "it looks like GB18030" in row.error


@pytest.mark.parametrize("rows", [200, 2000])  # once like UTF-32, once like UTF-16
def test_zero_bytes_of_a_parquet_file_are_not_taken_for_an_encoding(rows, tmp_path):
    columns = {"id": [str(number) for number in range(rows)], "text": ["text"] * rows}  # as in Wikipedia
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [row.content for row in read_rows(tmp_path / "a.parquet", ["text"])] == ["text"] * rows


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_utf16_and_utf32_are_told_by_their_byte_order_marks(encoding, tmp_path):
    with pytest.raises(UserError, match=rf"a\.jsonl: cannot be read: it is {encoding}; .*`iconv -f {encoding} -t"):
        rows_of(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode(encoding))


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
        ("\n \n", []),
        ('\n{"text": "a"}\n\n  \n{"text": "b"}\n\n', ["a", "b"]),
        ('{\n  "text": "a",\n  "x": [\n{"y": "{"}\n]}\n{\n"text": "b"\n}\n', ["a", "b"]),
    ],
)
def test_unusual_files_are_read(data, contents, tmp_path):
    for name in ("a.jsonl", "a.json"):
        assert [row.content for row in rows_of(tmp_path / name, data.encode())] == contents


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TWO_ROWS = [{"q": "a", "a": "b"}, {"q": "c", "a": None}]
JSON_FORMS = {
    "an object that holds a list": ({"version": "1.0", "data": TWO_ROWS}, TWO_ROWS),
    "instances (LMFlow)": ({"type": "text2text", "instances": TWO_ROWS}, TWO_ROWS),
    "a list under any name": ({"count": 2, "my_rows": TWO_ROWS, "tags": ["x"]}, TWO_ROWS),
    "a list beside another of other rows": ({"features": [{"name": "q"}], "rows": TWO_ROWS}, TWO_ROWS),
    "splits": ({"train": TWO_ROWS, "test": TWO_ROWS[:1], "dev": []}, [*TWO_ROWS, TWO_ROWS[0]]),
    "splits of one length": ({"train": TWO_ROWS, "test": TWO_ROWS}, TWO_ROWS * 2),
    "a row under each key": ({"x": TWO_ROWS[0], "y": TWO_ROWS[1]}, TWO_ROWS),
    "columns": ({"q": ["a", "c"], "a": ["b", None]}, TWO_ROWS),
    "columns (pandas)": ({"q": {"0": "a", "1": "c"}, "a": {"0": "b", "1": None}}, TWO_ROWS),
    "columns and data (pandas)": (
        {"columns": ["q", "a"], "index": [0], "data": [["a", "b"], ["c", None]]},
        TWO_ROWS,
    ),
    "a column of conversations": ({"messages": [MESSAGES, MESSAGES]}, [{"messages": MESSAGES}] * 2),
    "a conversation under each key": ({"x": MESSAGES, "y": MESSAGES}, [{"messages": MESSAGES}] * 2),
    "rows of different keys": ({"x": TWO_ROWS[0], "y": {"q": "c"}}, [TWO_ROWS[0], {"q": "c"}]),
    "a conversation": (MESSAGES, [{"messages": MESSAGES}]),
    "conversations": ([MESSAGES, MESSAGES], [{"messages": MESSAGES}] * 2),
    "one row of messages": ({"messages": MESSAGES}, [{"messages": MESSAGES}]),
    "one pair": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, None),
    "one pair of turns": ({"chosen": MESSAGES[0], "rejected": MESSAGES[1]}, None),
    "one row with ranked answers": ({"question": "q", "answers": [{"text": "a", "rank": 1}]}, None),
    "one task with instances": ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, None),
    "one conversation of MOSS": ({"conversation_id": "1", "chat": {"turn_1": {"Human": "q"}}}, None),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_rows_are_read_from_every_form_of_json(form, tmp_path):
    content, expected = JSON_FORMS[form]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
        assert [row.content for row in read_rows(tmp_path / "a.json")] == (expected or [content])


def test_an_object_of_several_lists_tells_what_is_read_of_it(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"train": TWO_ROWS, "test": TWO_ROWS[:1]}))
    assert [len(list(read_rows(tmp_path / "a.json"))) for _ in range(2)] == [3, 3]
    assert capsys.readouterr().out == f"{tmp_path}/a.json: all its lists are read: train (2 rows), test (1 rows)\n"
    (tmp_path / "b.json").write_text(json.dumps({"users": [{"name": "x"}], "talks": TWO_ROWS}))
    with pytest.raises(UserError, match="it holds lists of different rows: users, talks; keep one of them"):
        list(read_rows(tmp_path / "b.json"))


def test_lists_of_messages_may_be_lines_and_a_line_of_its_own_is_a_row(tmp_path):
    json_file(tmp_path / "a.jsonl", [MESSAGES] * 3)
    assert [row.content for row in read_rows(tmp_path / "a.jsonl")] == [{"messages": MESSAGES}] * 3
    json_file(tmp_path / "b.jsonl", [{"questions": ["a"], "answers": ["b"]}])
    assert [row.content for row in read_rows(tmp_path / "b.jsonl")] == [{"questions": ["a"], "answers": ["b"]}]


@pytest.mark.parametrize(
    "name, data, number, message",
    [
        ("a.jsonl", b'{"text": "a\x00b"}\n', 1, "not valid JSON: Invalid control character"),
        ("a.jsonl", b'{"text": "a"}\n' + b"\x00" * 9 + b"\n", 2, "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', 2, "not valid JSON: Unexpected UTF-8 BOM"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', 1, "not valid JSON: Extra data"),
        ("a.jsonl", b"[" * 200_000 + b"\n", 1, "the row is not an object|nested|recursion"),
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
        (
            "a.json",
            b'{\n"text": "a"\n}\n{\n"text": b}' + b" " * 99,
            r"a\.json:1: .*the object at line 4: not valid JSON: Expecting value",
        ),
        ("a.json", b"[" * 200_000, "row 1: not valid JSON: maximum recursion depth"),
        ("a.parquet", b"", r"a\.parquet: cannot be read: Parquet file size is 0 bytes"),
        ("a.csv", b'text\na\n"b\nc\n', r"a\.csv:2: cannot be read: unexpected end of data"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0) + b"tail",
            r"a\.jsonl\.gz:1: cannot be read: Not a gzipped",
        ),
        ("a.csv", b"", r"a\.csv: cannot be read: no column `text`"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_on_is_one_line(name, data, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / name, data)
    assert "\n" not in str(caught.value)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.slow
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


NOVELS = "第一章 雨\r\n\r\n下雨了。\r\n第二章 晴\r\n\r\n天晴了。\r\n=====\r\n\r\n第一章 雪\r\n下雪了。"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_txt_file_is_split_into_documents(end, tmp_path):
    data = NOVELS.replace("\r\n", end)

    def documents(data: str, **options: object) -> dict[int, str]:
        options = {key: re.compile(value) if key == "txt_separator" else value for key, value in options.items()}
        found = rows_of(tmp_path / "a.txt", data.encode(), **options)
        assert not any(row.error for row in found)
        return {row.number: row.content.replace(end, "|").strip("|") for row in found}

    whole = NOVELS.replace("\r\n", "|")
    first, second = whole.split("|=====||")
    assert documents(data) == {1: whole}
    assert documents(data, txt_separator="={3,}") == {1: first, 7: second}
    chapters = ["第一章 雨||下雨了。", "第二章 晴||天晴了。|=====", "第一章 雪|下雪了。"]
    assert documents(data, txt_separator="(?=第.章)") == dict(zip([1, 4, 9], chapters, strict=True))
    assert [*documents(data, txt_sample_by="line").values()] == whole.split("|")
    assert documents(data, txt_sample_by="paragraph") == {
        1: "第一章 雨",
        2: "下雨了。|第二章 晴",
        5: "天晴了。|=====",
        8: "第一章 雪|下雪了。",
    }
    assert documents("", txt_separator="=") == documents(f"{end}={end}=", txt_separator="=") == {}
    bad = rows_of(tmp_path / "a.txt", f"a{end}={end}b{end}".encode() + b"\xff", txt_separator=re.compile("="))
    assert [(row.content and row.content.strip(), row.number, row.error) for row in bad][0] == ("a", 1, "")
    assert bad[1].error == "not valid UTF-8" and (bad[1].number == 4 or end == "\r")


def test_old_line_ends_separate_json_rows(tmp_path):
    rows = rows_of(
        tmp_path / "a.jsonl", b'{"text": "a"}\r{"text": "b"}\r\n{"text": "c"}\n\r{"text": "d\x0b\xc2\x85"}\r'
    )
    assert [(row.number, row.content) for row in rows if not row.error] == [(1, "a"), (2, "b"), (3, "c")]
    rows = rows_of(tmp_path / "a.json", b'{\r"text": "a"\r}')
    assert [row.content for row in rows] == ["a"]


def peak_of(path: Path) -> int:
    tracemalloc.start()
    for _ in read_rows(path, ["text"]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_of_50_megabytes_is_read_in_memory_bounded_by_itself(name, tmp_path):
    text = "长" * 17_000_000
    json_file(tmp_path / name, [{"text": "a"}, {"text": text}, {"text": "b"}])
    rows = list(read_rows(tmp_path / name, ["text"]))
    assert [len(row.content) for row in rows] == [1, len(text), 1]
    del rows
    assert peak_of(tmp_path / name) < 6.5 * (tmp_path / name).stat().st_size


@pytest.mark.slow
def test_memory_for_a_json_array_does_not_grow_with_it(tmp_path):
    rows = [{"text": "春" * 1000}] * 2000
    small, large = json_file(tmp_path / "small.json", rows), json_file(tmp_path / "large.json", rows * 4)
    assert large.stat().st_size > 20e6
    assert peak_of(large) < 1.2 * peak_of(small) < 2e6


@pytest.mark.parametrize(
    "name, begin, piece",
    [
        ("line.csv", b"text\n", b"a" * 1000),
        ("Chinese.csv", b"text\n", "长".encode() * 1000),
        ("quoted.csv", b'text\n"', b"aaaaaaaaa\n" * 100),
        ("cells.csv", b"text\n", b"a," * 500),
        ("header.csv", b"", b"a," * 500),
        ("a.jsonl", b'{"text": "', b"a" * 1000),
        ("a.json", b'[{"text": "', b"a" * 1000),
        ("pretty.json", b'{\n"text": "', b"a" * 1000),
        ("a.txt", b"", b"a" * 1000),
    ],
)
def test_a_row_above_the_bound_is_refused_before_it_is_in_memory(name, begin, piece, tmp_path, monkeypatch):
    """30 MB in one row, where 1 MB is the bound; a CSV row used to be read whole."""
    for module in (lines, row_reader):
        monkeypatch.setattr(module, "LONGEST_ROW", 2**20)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(begin + piece * 30_000, compresslevel=1))

    def read() -> None:
        with pytest.raises(UserError, match="a row is longer than 1,048,576 bytes; split it"):
            list(read_rows(path, ["text"]))

    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "pretty.json", "nested.json"])
def test_a_row_of_too_many_values_is_refused_before_it_is_parsed(name, tmp_path, monkeypatch):
    """A list takes many times the memory of its text: 24 times if it holds empty lists."""
    monkeypatch.setattr(lines, "MOST_VALUES", 100_000)
    begin, end = {"lines": ("", ""), "array": ("[", "]"), "pretty": ("\n", ""), "nested": ("[[", "]]")}[
        name.split(".")[0]
    ]
    row = '{"text": "a", "ids":' + ("\n" if name == "pretty.json" else "") + " [" + "[]," * 1_000_000 + "0]}"
    (tmp_path / name).write_text(begin + row + end, encoding="utf-8")
    tracemalloc.start()
    try:
        rows = list(read_rows(tmp_path / name, ["text"]))
        assert len(rows) == 1
        message = rows[0].error
    except UserError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a row has more than 100,000 commas, so it holds too many values; split it" in message
    assert peak < 32 * 2**20


READ_PARQUET = """
import sys
from pathlib import Path
import pyarrow
from buddygpt.data.text.rows import read_rows
assert sum(1 for _ in read_rows(Path(sys.argv[1]), ["text"]))
print(pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.slow
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


def test_find_files_takes_names_globs_and_folders(tmp_path):
    for name in ("a.jsonl", "b/c.txt.zst", "b/notes.rst", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_files([str(tmp_path)]) == [tmp_path / "a.jsonl", tmp_path / "b" / "c.txt.zst"]
    assert find_files([str(tmp_path / "*")]) == [tmp_path / "a.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        find_files([str(tmp_path / ".git" / "*.jsonl")])
