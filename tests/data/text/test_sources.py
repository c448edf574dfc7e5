"""Tests of sources: every row of every public data set becomes its text, and errors name the wrong key or row."""

import csv
import json
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sources_table
from conftest import ROOT

from buddygpt.cli.errors import UserError
from buddygpt.data.text.readers import ROW_FUNCTIONS, SourceReader, parse_upvotes
from buddygpt.data.text.report import ExampleWriter
from buddygpt.data.text.sources import Source, load_readers, read_sources

DATA = ROOT.parent / "shared" / "data"


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
    return documents, step.counts.to_json()


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
            "wanjuan",
            "jsonl",
            EXAM | {"option_b": "", "std_ans": "", "answer": "二"},
            "一加一等于几？\nA. 一\n\n答案：二",
            {},
        ),
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
        ("ultra-fineweb-l3", "parquet", {"content": "改写"}, "改写", {}),
        ("fineweb-edu-chinese-v2-1", "parquet", {"text": "教", "score": 4.5}, "教", {"score": 4.5}),
        ("fineweb-edu-chinese-v2-2", "parquet", {"text": "教", "score": "4.5"}, "教", {"score": 4.5}),
        ("cci4-m2", "parquet", {"text": "网"}, "网", {}),
        ("firefly-train", "jsonl", {"kind": "NLI", "input": "问", "target": "答"}, "问\n\n答", {}),
        (
            "belle-dialogues",
            "json",
            {"id": "1", "conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]},
            "问\n\n答",
            {},
        ),
        (
            "moss-003",
            "jsonl",
            {"conversation_id": 1, "category": "c", "conversation": [{"human": "问", "assistant": "答"}] * 2},
            "问\n\n答\n\n问\n\n答",
            {},
        ),
        ("smoltalk-chinese", "parquet", {"conversations": [{"role": "user", "content": "问"}]}, "问", {}),
        ("ultradata-sft", "jsonl", {"uid": "1", "messages": [{"role": "user", "content": "问"}]}, "问", {}),
    ],
)
def test_a_row_of_every_set_becomes_its_text(reader, suffix, row, text, metadata, tmp_path):
    path = write_rows(tmp_path / f"rows.{suffix}", [row])
    (source,) = read_sources([{"reader": reader, "path": str(path)}])
    (document,), counts = read(source)
    assert document.text == text
    assert document.metadata == {"source": reader} | metadata
    assert document.id == f"{path}:1" and counts == {"read": 1}


def test_every_function_of_sources_yaml_exists_and_none_is_left_over():
    assert {reader.function for reader in load_readers().values()} - {""} == set(ROW_FUNCTIONS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("web: {hub: a/b, text_key: text}", "sources.yaml: `web`: .*text_key.* expected a list, got str"),
        ("web: {hub: a/b, text: [text]}", "sources.yaml: `web`: .*unexpected keyword argument 'text'"),
        ("web: {hub: a/b, text_key: [text], join: [a, b]}", "`web`: .*give one of text_key, join and function"),
        ("web: text", "sources.yaml: `web`: "),
        ("web: [", "sources.yaml is not valid YAML: "),
    ],
)
def test_a_mistake_in_sources_yaml_is_named_in_one_line(text, message, tmp_path):
    (tmp_path / "sources.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_readers(tmp_path / "sources.yaml")
    assert "\n" not in str(caught.value)


def test_the_readme_holds_the_table_of_sources_yaml():
    readme = (ROOT / "data" / "README.md").read_text("utf-8")
    assert sources_table.replace_table(readme) == readme, "run python tools/sources_table.py"


def test_every_reader_is_in_the_table_of_sources_with_its_place():
    table = (ROOT / "data" / "README.md").read_text("utf-8")
    for reader in load_readers().values():
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
    counts = step.counts.to_json()
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
        ({"path": "x.jsonl", "txt_sample_by": "word"}, "txt_sample_by is `word`; use document, paragraph or line"),
        ({"path": "x.jsonl", "name": "a/b"}, "name is `a/b`; use letters"),
        ({"path": []}, r"path is `\[\]`; use a path"),
        ({}, "reader `columns` is not on the Hub; set `path` to its files"),
        ({"reader": "wanjuan"}, "reader `wanjuan` is not on the Hub"),
        (
            {"reader": "wikipedia", "language": "fr"},
            "reader `wikipedia` has zh, en on the Hub; for another",
        ),
        (3, "`3` is neither a path nor a mapping"),
        ("nowhere/*.jsonl", "no file matches `nowhere/"),
        ("nobody/no-set", "no file matches `nobody/no-set`; of the Hub, it is `hf://nobody/no-set`"),
        ({"path": " "}, "path is ` `; use a path"),
        ("", "path is ``; use a path"),
        ("*", r"entry 1: notes.rst: unknown type; use one of .jsonl, .*, or these as .gz or .zst"),
        ("memory://nowhere/*.jsonl", "no file matches `memory://nowhere/"),
        ("nosuch://x", "nosuch://x: cannot be read: Protocol not known: nosuch"),
    ],
)
def test_a_mistake_in_an_entry_is_named(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "x.jsonl", [{"text": "a"}])
    Path("notes.rst").write_text("a")
    with pytest.raises(UserError, match=message):
        read_sources([entry])


def test_a_name_or_a_file_that_occurs_twice_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="entry 2: another source is called `n`; give each a different `name`"):
        read_sources([{"path": f"{name}.jsonl", "name": "n"} for name in "ab"])
    with pytest.raises(UserError, match=r"a\.jsonl is in source `a` and in `tmp`; to repeat it, use `epochs`"):
        read_sources(["a.jsonl", {"name": "tmp", "path": "*.jsonl"}])


@pytest.mark.parametrize(
    "reader, row, message",
    [
        ("wikipedia", {"text": "a"}, r"x\.jsonl:1: no column `title`; there are: text"),
        ("baidubaike", {"title": "a", "sections": "b"}, r"x\.jsonl:1: not a row of `baidubaike`"),
        ("baike-qa", {"title": 3, "answer": "b"}, r"x\.jsonl:1: not a row of `baike-qa`"),
        ("zhihu-kol", ZHIHU | {"METADATA": "{"}, r"x\.jsonl:1: Expecting property name"),
        ("wanjuan", {"content": ["a"]}, r"x\.jsonl:1: the text holds list, not text"),
        ("columns", {"text": "a", "score": "high"}, r"x\.jsonl:1: `score` has a minimum but is not a number here"),
        ("columns", {"text": "a"}, r"x\.jsonl:1: `score` has a minimum but is not a number here"),
    ],
)
def test_a_row_of_another_form_stops_the_run_or_is_counted(reader, row, message, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row, {}])
    entry = {"reader": reader, "path": str(path)} | ({"min_score": 1} if reader == "columns" else {})
    (source,) = read_sources([entry])
    with pytest.raises(UserError, match=f"{message}.* Fix it, or set `on_bad_row: skip`"):
        read(source)
    documents, counts = read(source, on_bad_row="skip")
    assert counts == {"read": 2, "dropped_bad_row": 1} and [document.text for document in documents] == [""]


def test_bad_rows_are_among_the_examples_with_what_is_wrong(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"body": "b"}])
    (source,) = read_sources([str(path)])
    with ExampleWriter(tmp_path / "examples") as writer:
        assert not list(SourceReader([(source, source.files)], "skip", writer).run())
    example = json.loads((tmp_path / "examples" / "00000.jsonl").read_bytes())
    assert (example["rule"], example["id"]) == ("bad_row", f"{path}:1")
    assert example["text"] == "no column `text`; there are: body"


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
