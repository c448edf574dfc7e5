"""Decontamination: planted benchmark items are found in any spelling; texts that only share words are kept."""

import csv
import gzip
import json
from pathlib import Path

import opencc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datatrove.data import Document

from buddygpt.cli.errors import UserError
from buddygpt.data.text.benchmarks import read_benchmarks, read_multiple_choice
from buddygpt.data.text.steps.decontaminate import (
    MIN_SHARED,
    BenchmarkIndex,
    BenchmarkIndexer,
    Decontaminator,
    _hash_words,
    build_index,
)

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
BENCHMARKS = [str(DATA / "eval" / name) for name in ("cmmlu", "ceval", "mmlu", "gsm8k/test.jsonl")]
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}

QUESTIONS = [
    ["一个长方体水箱从上面注水，水面高度每分钟上升两厘米，注满需要多久？", "十分钟", "二十分钟", "半小时", "一小时"],
    ["关于城市公园的管理规定，任何人不得在湖中游泳或者向湖中投放", "活鱼", "石块", "船只", "垃圾"],
    ["下列说法正确的是", "冰比水重", "铁比铜重", "油比水轻", "木比铁重"],
    ["下列说法正确的是", "鲸是一种鱼", "蝙蝠是一种鸟", "海马是一种鱼", "企鹅不是鸟"],
    [
        "Which of the two brothers in the fable reaches the old mill first?",
        "The elder",
        "The younger",
        "Both",
        "No one",
    ],
]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> BenchmarkIndex:
    folder = tmp_path_factory.mktemp("exam")
    write_csv(folder / "village.csv", [["", "Question", "A", "B", "C", "D", "Answer"]] + with_answers(QUESTIONS))
    return build_index([str(folder / "village.csv")], folder / "index")


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def with_answers(questions: list[list[str]]) -> list[list[str]]:
    return [[str(number), *question, "A"] for number, question in enumerate(questions)]


def spellings(question: str, options: list[str]) -> list[str]:
    """Return copies of an item, as they differ in practice."""
    marked = list(zip("ABCDEFGH", options, strict=False))
    dotted = question + "\n" + "\n".join(f"{mark}. {option}" for mark, option in marked)
    spaced = "".join(f"{sign} " if "\u4e00" <= sign <= "\u9fff" else sign for sign in question.replace(" ", "\n "))
    return [
        dotted,
        dotted.translate(WIDE),
        f"（1）{question}" + "".join(f"（{mark}）{option}；" for mark, option in marked) + "答案：C",
        spaced + "\r\n" + "\t".join(f"{mark.lower()}){option.upper()}" for mark, option in marked),
    ]


@pytest.mark.parametrize("item", QUESTIONS, ids=range(len(QUESTIONS)))
def test_an_item_is_found_in_every_spelling(index, item):
    frame = "村里的人都说，那年的雨水比往年多，收成也好，大家聚在一起喝茶聊天。" * 400
    for text in spellings(item[0], item[1:]):
        found = index.find(frame[:5000] + text + frame)
        assert [place.split(": ")[1] for place in found] == [item[0][:40]]


def test_an_item_is_found_in_traditional_chinese(index):
    for config in ("s2t", "s2tw", "s2hk", "s2twp"):
        converter = opencc.OpenCC(config)
        for item in QUESTIONS[:4]:
            text = converter.convert(spellings(item[0], item[1:])[0])
            assert [place.split(": ")[1] for place in index.find(text)] == [item[0][:40]]


def test_an_item_with_a_passage_is_found_as_a_whole(tmp_path):
    passage = "小镇的图书馆每天早上九点开门，晚上六点关门。星期三的下午，馆员给孩子们讲故事，讲完以后大家一起画画。"
    question = "孩子们什么时候可以听故事？"
    rows = [
        {
            "Body": "Tom had 12 red apples in a basket and gave 5 of them to his sister Ann.",
            "Question": "How many left?",
        },
        {"context": passage, "question": question, "options": ["星期一上午", "星期三下午", "星期五晚上", "星期天"]},
        {"passage": passage, "question": "图书馆晚上几点关门，早上几点开门？"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    index = build_index([str(tmp_path / "a.jsonl")], tmp_path / "index")
    for row in rows:
        whole = "\n".join(
            (row.get("Body") or row.get("context") or row["passage"], row.get("Question") or row["question"])
        )
        assert len(index.find("\n".join([whole, *row.get("options", [])]))) == 1, row
    assert index.find(f"{passage}镇上的人都很喜欢这个图书馆。") == []
    assert index.find("She looked into the basket. How many left? Nobody could tell, and nobody asked again.") == []


PASSAGE = "小镇的图书馆每天早上九点开门，晚上六点关门。星期三的下午，馆员给孩子们讲故事，讲完以后大家一起画画。"
ASKED = "孩子们什么时候可以去听故事？"
TIMES = ["星期一上午", "星期三下午", "星期五晚上", "星期天"]
# Rows as they are published, each with one question about the passage.
FORMS_WITH_PASSAGES = {
    "squad.json": {"data": [{"title": "t", "paragraphs": [{"context": PASSAGE, "qas": [{"question": ASKED}]}]}]},
    "cmrc.json": [{"context_text": PASSAGE, "title": "t", "qas": [{"query_text": ASKED, "answers": ["星期三"]}]}],
    "race.jsonl": {"article": PASSAGE, "questions": [ASKED], "options": [TIMES], "answers": ["B"]},
    "c3.json": [[[PASSAGE[:22], PASSAGE[22:]], [{"question": ASKED, "choice": TIMES, "answer": TIMES[1]}], "1"]],
    "c3_flat.jsonl": {"context": [PASSAGE[:22], PASSAGE[22:]], "question": ASKED, "choice": TIMES},
    "logiqa.jsonl": {"text": PASSAGE, "question": ASKED, "options": TIMES, "answer": 1},
    "ocnli.jsonl": {"sentence1": PASSAGE, "sentence2": "周日下午去的孩子听不到故事。", "label": "neutral"},
    "xnli.jsonl": {"premise": PASSAGE, "hypothesis": "周日下午去的孩子听不到故事。", "label": 1},
    "arc.jsonl": {"question": {"stem": ASKED, "choices": [{"text": each, "label": "A"} for each in TIMES]}},
    "copa.jsonl": {"premise": PASSAGE, "question": ASKED, "choice1": TIMES[0], "choice2": TIMES[1]},
}


@pytest.mark.parametrize("name", FORMS_WITH_PASSAGES)
def test_published_forms_of_questions_about_a_passage_are_found_as_a_whole(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(FORMS_WITH_PASSAGES[name], ensure_ascii=False), encoding="utf-8")
    (item,) = read_benchmarks([str(tmp_path / name)])
    assert (item.context.replace("\n", ""), item.question) == (
        "" if name.startswith("arc") else PASSAGE,
        "周日下午去的孩子听不到故事。" if "nli" in name else ASKED,
    )
    assert item.options == ([] if name[:2] in ("sq", "cm", "oc", "xn") else TIMES[: 2 if "copa" in name else 4])
    index = build_index([str(tmp_path / name)], tmp_path / "index")
    frame = "村里的人都说，那年的雨水比往年多，收成也好，大家聚在一起喝茶聊天。" * 40
    whole = "\n".join([item.context, item.question, *item.options])
    assert len(index.find(f"{frame}{opencc.OpenCC('s2tw').convert(whole)}{frame}")) == 1
    assert index.find(f"{frame}{PASSAGE}{frame}") == []


@pytest.mark.parametrize(
    "text",
    [
        "下列说法正确的是：今年的雨水比往年多。",  # a phrase that two items share
        "关于城市公园的管理规定已经公布，任何人不得在湖中游泳。违者由公园管理处处以罚款。",
        "水箱里的水面高度每分钟上升两厘米，半小时后就满了，一小时后溢了出来。",
        "The two brothers in the fable walk home. The elder reaches the old mill, the younger no one ever saw.",
        "甲：十分钟。乙：二十分钟。丙：半小时。丁：一小时。",  # options without their question
        "",
        "！？",
    ],
)
def test_an_innocent_overlap_is_kept(index, text):
    assert index.find(text) == []


def test_a_question_without_its_options_counts_in_a_short_text_alone(index):
    """A match in a long text is a quotation of the same source: here the rules of a park."""
    quoted = f"{QUESTIONS[1][0]}任何废弃物，违者罚款。"
    other = "".join(
        f"第{number}条，公园每天早上{number}点开门，闭园时间另行通知，票价{number}元。" for number in range(400)
    )
    assert len(index.find(other[:900] + quoted + other[:900])) == 1
    assert index.find(other + quoted + other) == []


def test_words_spread_over_a_long_text_do_not_match(index):
    filler = "那年的雨水比往年多，收成也好，大家聚在一起喝茶。" * 20
    question, *options = QUESTIONS[0]
    assert index.find(question[:16] + filler + question[10:] + filler + "".join(options)) == []


def test_the_filter_drops_by_benchmark_and_names_the_item(index, tmp_path):
    write_csv(tmp_path / "village.csv", [["question", "A", "B", "C", "D"], *QUESTIONS])
    stage = BenchmarkIndexer([str(tmp_path / "village.csv")], tmp_path / "index")
    stage.run()
    step, kept = Decontaminator(tmp_path / "index"), Document("雨水比往年多。", id="0")
    dropped = Document(spellings(QUESTIONS[0][0], QUESTIONS[0][1:])[0], id="1")
    assert list(step.run(iter([kept, dropped]))) == [kept]
    assert step.stats["dropped_exam_village"].total == 1
    assert dropped.metadata["exam_item"].startswith("village/village.csv:2: 一个长方体水箱")
    files = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    stage.run()  # again, as after a kill
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}


def test_an_exam_in_another_encoding_is_named_with_the_command_that_converts_it(tmp_path):
    rows = [["question", *"ABCD", "answer"], *[[*question, "A"] for question in QUESTIONS]]
    write_csv(tmp_path / "exam.csv", rows)
    assert [row["question"] for _, row in read_multiple_choice(tmp_path / "exam.csv")] == [row[0] for row in QUESTIONS]
    text = (tmp_path / "exam.csv").read_text(encoding="utf-8")
    (tmp_path / "exam.csv").write_text(text, encoding="gb18030")
    with pytest.raises(UserError, match=r"exam\.csv: not valid UTF-8; it looks like GB18030: convert it with `iconv"):
        list(read_multiple_choice(tmp_path / "exam.csv"))


def test_every_form_of_benchmark_is_read(tmp_path):
    question, options = QUESTIONS[0][0], QUESTIONS[0][1:]
    letters = dict(zip("ABCD", options, strict=True))
    write_csv(tmp_path / "1.csv", [["", "Question", *"ABCD", "Answer"], ["0", question, *options, "B"]])
    write_csv(tmp_path / "2.csv", [[question, *options, "B"]])
    write_csv(tmp_path / "9.csv", [[question, "input", *options[1:], "B"]])  # the option is no name of a column
    (tmp_path / "3.jsonl").write_text(json.dumps({"problem": question, "choices": options}), encoding="utf-8")
    (tmp_path / "4.json").write_text(json.dumps([{"question": question, "options": letters}]), encoding="utf-8")
    row = {f"option_{mark.lower()}": option for mark, option in letters.items()} | {"q_main": question}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "5.parquet")
    with gzip.open(tmp_path / "6.csv.gz", "wt", encoding="utf-8-sig") as file:
        file.write("题目,选项A,选项B,选项C,选项D\n" + ",".join([question, *options]))
    arc = {"question": question, "choices": {"text": options, "label": list("ABCD")}}
    (tmp_path / "7.jsonl").write_text(json.dumps(arc), encoding="utf-8")
    (tmp_path / "8.txt").write_text(f"{question}\n", encoding="utf-8")
    (tmp_path / "settings.json").write_text('{\n "subjects": ["maths"]\n}', encoding="utf-8")
    items = list(read_benchmarks([str(tmp_path)]))
    assert [item.question for item in items] == [question] * 9
    assert [item.options for item in items] == [options] * 7 + [[], ["input", *options[1:]]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("exam.jsonl", '{"question": "' + "问" * 20 + '"}\n{"question": \n', r"exam\.jsonl:2: not valid JSON"),
        ("exam.txt", "1+1=?\n", "every question is too short"),
        ("exam.csv", "id,title\n1,two\n", "no file has a column of questions"),
        ("exam.csv", b"question,A\n\xff\xfe,1\n", r"exam\.csv: not valid UTF-8"),
        (
            "exam.csv",
            "question,A\nWho?,me\n".encode("utf-16-le"),
            "cannot be read: it is UTF-16LE; convert",
        ),
        ("exam.csv", "question,A\nWho?,me\n".encode("utf-16"), r"exam\.csv: cannot be read: it is UTF-16; convert"),
        (
            "exam.csv",
            f"question,A\n{QUESTIONS[0][0]},1\n".encode("gb18030"),
            r"exam\.csv: not valid .* like GB18030: conv",
        ),
        ("exam.txt", f"{QUESTIONS[0][0]}\n".encode("gb18030"), r"exam\.txt:1: not valid UTF-8; it looks like GB18030"),
        ("other.txt", "question", "no file matches"),
    ],
)
def test_mistakes_in_benchmarks_are_reported(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        BenchmarkIndexer([str(tmp_path / name.replace("other", "exam"))], tmp_path / "index").run()
    assert not (tmp_path / "index").exists()


@pytest.fixture(scope="module")
def real_index(tmp_path_factory) -> BenchmarkIndex:
    return build_index(BENCHMARKS, tmp_path_factory.mktemp("real"))


@needs_data
def test_every_planted_item_of_real_benchmarks_is_found(real_index):
    frame = "村里的人都说，那年的雨水比往年多，收成也好。The rain was good to us that year, people say. " * 3
    items = list(read_benchmarks(BENCHMARKS))
    assert len(items) > 24_000
    planted = [spellings(item.question, item.options)[number % 4] for number, item in enumerate(items)]
    for start in range(0, len(items), 20):
        found = real_index.find(frame + frame.join(planted[start : start + 20]))
        for item, text in zip(items[start : start + 20], planted[start : start + 20], strict=True):
            # The index keeps one of equal items, under the name of the first.
            assert item.place in found or real_index.find(f"{frame}{text}{frame}"), item


@needs_data
def test_every_question_that_can_be_told_is_found_without_its_options(real_index):
    frame = "村里的人都说，那年的雨水比往年多，收成也好。The rain was good to us that year, people say. " * 3
    questions = {item.question for item in read_benchmarks(BENCHMARKS)}
    missed = [text for text in questions if not real_index.find(f"{frame}{text}{frame}")]
    assert max(len(_hash_words(text)) for text in missed) < MIN_SHARED
    assert len(missed) < 0.05 * len(questions)


@needs_data
def test_no_law_and_no_web_page_matches_a_benchmark(real_index):
    for name, key in {"zh_laws": "text", "wanjuan_zh_web_sample": "content", "en_books": "text"}.items():
        with gzip.open(DATA / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                assert real_index.find(json.loads(line)[key]) == []
