"""Questions of an evaluation in the text of the training shards."""

import json

import pytest
from conftest import run
from result_files import write_results
from tiny_tokenizer import train_tiny_tokenizer, write_jsonl

from buddygpt.eval.reporting.contamination import describe, removed_documents, search_shards
from buddygpt.eval.reporting.results import read_runs

pytestmark = pytest.mark.slow
QUESTIONS = [
    {"question": "Which river flows through the old town of Heidelberg?", "A": "Neckar", "B": "Rhine", "C": "Main"},
    {"question": "谁在一九五二年发现了这座古代城市的遗址？", "choices": ["王明", "李华", "张伟", "赵强"]},
    {"prompt": [{"role": "user", "content": "请问北宋时期有哪几位著名的书法家？"}], "answer": "苏轼"},
    {"goal": "Keep bread fresh for a week", "sol1": "Put it into a closed box", "sol2": "Leave it in the sun"},
    {"question": "2+2?"},
]


def test_questions_are_found_in_the_text_of_the_shards(tmp_path):
    documents = [
        "A quiz: WHICH river flows through the old town of Heidelberg? (A) Neckar (B) Rhine (C) Main. And more text.",
        "The river flows through the old town. 春天到了。",
        "请问北宋时期有哪几位著名的书法家？苏轼。",
        "Keep bread fresh for a week: put it into a closed box, leave it in the sun.",
    ]
    tokenizer = train_tiny_tokenizer(tmp_path)
    text = write_jsonl(tmp_path / "documents.jsonl", documents)
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam/test.jsonl").write_text(json.dumps(QUESTIONS[2]["prompt"][0], ensure_ascii=False))
    prepare = ["--sources", text, "--tokenizer", tokenizer, "--eval_fraction", 0, "--decontaminate", tmp_path / "exam"]
    run("data/prepare_pretrain.py", *prepare, "--output", tmp_path / "shards")
    shards = tmp_path / "shards/train"
    assert removed_documents(shards) == {"exam": 1}

    rows = [{"doc": question} for question in QUESTIONS]
    for number, row in enumerate(rows):
        write_results(tmp_path / f"results/base{number}", {f"task{number}": [1]}, rows=row)
    found = search_shards(read_runs(tmp_path / "results"), shards)
    assert {task: (each.searched, each.found) for task, each in found.items()} == {
        "task0": (1, 1),
        "task1": (1, 0),
        "task2": (1, 0),  # left out of the shards
        "task3": (1, 1),
        "task4": (0, 0),  # too short to be recognized
    }
    rows = {row[0]: row for row in describe(found)}
    assert rows["task0"][4] == "100.0%" and rows["task4"][4] == "" and rows["task0"][5].startswith("A quiz:")
