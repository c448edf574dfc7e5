"""The sample agrees with its tables, is the same every time, and has no evaluation question in its training text."""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from buddygpt.cli.errors import UserError
from buddygpt.data.sample import make_sample

SAMPLE = ROOT / "data" / "sample"
TRAINING = ("pretrain.jsonl", "sft_train.jsonl", "preference_train.jsonl")
WELL_KNOWN = [
    ("山东的省会是哪里？", "济南"),
    ("鄂是哪个省的简称？", "湖北"),
    ("加拿大的首都是哪里？", "渥太华"),
    ("Au是哪种元素的符号？", "金"),
    ("铁的原子序数是多少？", "26"),
    ("北宋的开国皇帝是谁？", "赵匡胤"),
    ("《红楼梦》的作者是谁？", "曹雪芹"),
    ("1公里等于多少米？", "1000"),
    ("端午节在哪一天？", "农历五月初五"),
    ("龙在十二生肖中排第几？", "第五"),
    ("7乘8等于多少？", "56"),
    ("What is the capital of Australia?", "Canberra"),
    ("What is the plural of child?", "children"),
    ("What is the past tense of go?", "went"),
    ("你是谁？", "我是小布，一个小小的中英文语言模型。"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "out"
    run("--output", str(folder))
    return folder


@pytest.fixture(scope="module")
def tables():
    return [make_sample.load_table(path) for path in sorted((SAMPLE / "tables").glob("*.yaml"))]


@pytest.fixture(scope="module")
def training_text(output):
    """Return every string a model is trained on, one per line, without punctuation."""
    strings = []
    for name in TRAINING:
        for row in rows(output / name):
            messages = [message for part in row.values() if isinstance(part, list) for message in part]
            strings += [row["text"]] if "text" in row else [message["content"] for message in messages]
    return "\n".join(bare(string) for string in dict.fromkeys(strings))


def bare(text):
    """Return letters, digits and arithmetic signs only, so that quotes or a comma do not make a different phrase."""
    return re.sub(r"[^\w+×=]", "", text.lower())


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_sample.py", *arguments])
        make_sample.main()


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def exam_rows(output, split):
    for path in sorted((output / "exam" / split).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            yield from ((path.stem, row) for row in csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked_in_evaluation(output):
    yield from (row["question"] for row in rows(output / "qa_test.jsonl"))
    yield from (row["messages"][0]["content"] for row in rows(output / "sft_eval.jsonl"))
    yield from (row["prompt"][0]["content"] for row in rows(output / "preference_eval.jsonl"))
    yield from (row["question"] for split in make_sample.EXAM_SPLITS for _, row in exam_rows(output, split))


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_and_another_seed_others(output, tmp_path):
    command = [sys.executable, str(SAMPLE / "make_sample.py"), "--output", str(tmp_path / "again")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=tmp_path)
    assert contents(tmp_path / "again") == contents(output)
    run("--output", str(tmp_path / "other"), "--seed", "1")
    assert contents(tmp_path / "other").keys() == contents(output).keys()
    assert contents(tmp_path / "other") != contents(output)


@pytest.mark.slow
def test_no_heldout_question_occurs_in_training_text(tables, output, training_text):
    possible = [fact.ask(t)[0] for table in tables for fact in table.facts() for t in fact.relation.heldout]
    asked = list(asked_in_evaluation(output))
    assert len(asked) > 1000
    assert [question for question in {*possible, *asked} if bare(question) in training_text] == []


def test_no_heldout_template_is_part_of_a_training_template(tables):
    for table in tables:
        for relation in table.relations:
            trained = (*table.passages, *relation.statements, *relation.questions, relation.follow_up)
            assert [t for t in relation.heldout if any(bare(t) in bare(other) for other in trained)] == []
            assert len(set(relation.questions)) >= 6 and len(set(relation.heldout)) >= 3


def test_all_questions_of_a_relation_name_the_same_key(tables):
    for relation in (relation for table in tables for relation in table.relations):
        templates = (*relation.questions, *relation.heldout, relation.follow_up)
        assert len({frozenset(make_sample.columns_of(template)) for template in templates}) == 1, relation
        assert relation.answer not in make_sample.columns_of(relation.follow_up)


def test_every_fact_is_told_and_asked_in_training(tables, output, training_text):
    asked = {(r["messages"][-2]["content"], r["messages"][-1]["content"]) for r in rows(output / "sft_train.jsonl")}
    for table in tables:
        for fact in table.facts():
            told = [t for t in fact.relation.statements if bare(t.format(**fact.row)) in training_text]
            assert len(told) >= 3, fact
            assert {fact.ask(t) for t in fact.relation.questions} <= asked


def test_a_question_has_one_answer_in_all_tables(tables):
    answers = {}
    for fact in (fact for table in tables for fact in table.facts()):
        for question, answer in map(fact.ask, (*fact.relation.questions, *fact.relation.heldout)):
            assert answers.setdefault(question, answer) == answer, question


@pytest.mark.slow
@pytest.mark.parametrize(("question", "answer"), WELL_KNOWN)
def test_well_known_facts_are_taught(output, question, answer):
    chats = [row["messages"] for row in rows(output / "sft_train.jsonl")]
    assert [chat[1]["content"] for chat in chats if chat[0]["content"] == question and len(chat) == 2] == [answer]


def test_arithmetic_is_right():
    for name, calculate in (("zh_addition", int.__add__), ("zh_multiplication", int.__mul__)):
        table = yaml.safe_load((SAMPLE / "tables" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert [row for row in table["rows"] if calculate(row[0], row[1]) != row[2]] == []


def test_exam_rows_have_one_right_answer_and_balanced_letters(tables, output):
    answers = {}
    for table in tables:
        for fact in table.facts():
            answers |= {
                (table.subject, *fact.ask(template)): fact.wrong_answers() for template in fact.relation.heldout
            }
    for split in make_sample.EXAM_SPLITS:
        letters = Counter()
        for subject, row in exam_rows(output, split):
            options = {letter: row[letter] for letter in "ABCD"}
            assert tuple(row) == ("id", "question", "A", "B", "C", "D", "answer")
            assert len(set(options.values())) == 4
            right = options.pop(row["answer"])
            assert set(options.values()) <= set(answers[subject, row["question"], right])
            letters[row["answer"]] += 1
        assert min(letters.values()) >= 0.2 * letters.total()
        assert max(letters.values()) <= 0.3 * letters.total()
    assert 250 <= letters.total() <= 400


def test_exam_asks_a_fact_in_one_split_only(tables, output):
    facts = {fact.ask(t): fact for table in tables for fact in table.facts() for t in fact.relation.heldout}
    asked = [row for split in make_sample.EXAM_SPLITS for _, row in exam_rows(output, split)]
    counts = Counter(facts[row["question"], row[row["answer"]]] for row in asked)
    assert set(counts.values()) == {1}


def test_languages_are_three_to_one_by_bytes(output):
    texts = [row["text"] for row in rows(output / "pretrain.jsonl")]
    chinese = sum(len(text.encode()) for text in texts if not text.isascii())
    english = sum(len(text.encode()) for text in texts if text.isascii())
    assert 2 < chinese / english < 4
    assert 250_000 < chinese + english < 2_000_000


def test_rows_have_their_schema(output):
    assert all(list(row) == ["text"] and row["text"].strip() for row in rows(output / "pretrain.jsonl"))
    assert all(set(row) == {"question", "answer", "subject", "language"} for row in rows(output / "qa_test.jsonl"))
    for name in ("sft_train", "sft_eval"):
        for row in rows(output / f"{name}.jsonl"):
            roles = [message["role"] for message in row["messages"] if message["content"].strip()]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns and turns == ["user", "assistant"] * (len(turns) // 2)
    conversations = [row["messages"] for row in rows(output / "sft_train.jsonl")]
    assert sum(chat[0]["role"] == "system" for chat in conversations) > 100
    assert sum(len(chat) > 3 for chat in conversations) > 300


def test_pairs_reject_wrong_repetitive_and_evasive_answers_alike(tables, output):
    evasions = yaml.safe_load((SAMPLE / "conversations.yaml").read_text(encoding="utf-8"))
    wrong = {}
    for name, key in (("train", "evasions"), ("eval", "heldout_evasions")):
        evasive = {line for block in evasions.values() for line in make_sample.lines(block[key])}
        kinds = Counter()
        for row in rows(output / f"preference_{name}.jsonl"):
            (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
            assert (prompt["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
            assert chosen["content"] != rejected["content"]
            repeated = rejected["content"].count(chosen["content"]) >= 4
            kinds["evasive" if rejected["content"] in evasive else "repetitive" if repeated else "wrong"] += 1
            if rejected["content"] not in evasive and not repeated:
                wrong[name, prompt["content"]] = rejected["content"]
        assert max(kinds.values()) - min(kinds.values()) <= 1 and len(kinds) == 3
    trained = {}
    for table in tables:
        for fact in table.facts():
            seen = {wrong.get(("train", fact.ask(t)[0])) for t in fact.relation.questions}
            later = {wrong.get(("eval", fact.ask(t)[0])) for t in fact.relation.heldout}
            trained[fact] = (seen & later) - {None}
    assert not any(trained.values())


@pytest.mark.slow
def test_identical_output_is_left_alone_and_a_changed_one_is_replaced(tmp_path, capsys):
    folder = tmp_path / "out"
    run("--output", str(folder))
    inode = folder.stat().st_ino
    run("--output", str(folder))
    assert "already in" in capsys.readouterr().out and folder.stat().st_ino == inode
    (folder / "qa_test.jsonl").write_text("old\n")
    run("--output", str(folder))
    assert "written to" in capsys.readouterr().out
    assert len(rows(folder / "qa_test.jsonl")) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt"):
        run("--output", str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        run("--output", str(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("columns:", "colums:", "columns"),
        ("heldout:", "held_out:", "held_out"),
        ("[France, Paris]", "[France]", "shorter"),
        ("The capital of {country}", "The capital of {contry}", "contry"),
        ("rows:", "rows: [", "not a table"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, old, new, complaint):
    text = (SAMPLE / "tables" / "en_capitals.yaml").read_text(encoding="utf-8")
    path = tmp_path / "en_capitals.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=f"(?s)en_capitals.yaml.*{complaint}"):
        make_sample.load_table(path)


def test_another_folder_is_refused_at_its_first_file(tmp_path, monkeypatch):
    """--output / must not read the whole disk."""
    (tmp_path / "notes.txt").write_text("mine")

    def list_endlessly(folder: Path, pattern: str):
        yield folder / "notes.txt"
        pytest.fail("it looks on")

    monkeypatch.setattr(Path, "rglob", list_endlessly)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"it reads {path}"))
    with pytest.raises(UserError, match="holds notes.txt, no part of the sample; name another folder"):
        make_sample.write_files({"a.jsonl": ""}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_files_of_the_user_with_names_of_the_sample_are_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(UserError, match="holds a.jsonl, but no whole sample; name another folder"):
        make_sample.write_files({"a.jsonl": "", "b.jsonl": ""}, tmp_path)
    (tmp_path / "c.jsonl").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds c.jsonl, no part of the sample"):
        make_sample.write_files({"a.jsonl": ""}, tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == "mine"
