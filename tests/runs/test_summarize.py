"""Tests of the summary of a finished run, and of its one line for files that are damaged."""

import json

import pytest
from conftest import run

from buddygpt.cli.errors import UserError

PROPORTION = {"value": 0.5, "n": 2, "ci95": [0.1, 0.9], "chance": 0.25}
TASKS = {
    **{task: {"acc": PROPORTION} for task in ("sample_exam_text", "sample_exam_letter", "sample_pairs")},
    "sample_pairs/rejected_not_longer": {"acc": PROPORTION},
    "sample_qa": {"exact_match": PROPORTION},
    "heldout_text": {"bits_per_byte": {"value": 0.25, "n": 2, "ci95": None, "chance": None}},
}
SCORES = dict.fromkeys(("base", "sft", "dpo"), TASKS)
FILES = {
    "eval/scores.json": SCORES,
    "pretrain/run.json": {"parameters": 1000, "tokens_seen": 2000},
    "dpo/run.json": {"metrics": {"eval_rewards/accuracies": 0.75}},
    "chat.json": [{"question": "Q", "answer": "A"}],
    "seconds.tsv": "sample\t1\tdone\npretrain\t2\tstopped\npretrain\t3\tdone\n",
}


@pytest.fixture
def finished(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_the_summary_holds_the_measurements_of_all_stages(finished):
    run("runs/summarize.py", "--run", finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["exam"]["sft"] == {"acc": 0.5, "n": 2, "ci95": [0.1, 0.9]} and summary["exam"]["chance"] == 0.25
    assert (summary["dpo_reward_accuracy"], summary["parameters"], summary["tokens_seen"]) == (0.75, 1000, 2000)
    assert summary["bits_per_byte"] == 0.25 and summary["seconds"]["pretrain"] == 5
    assert "> **Q**\n> A" in (finished / "report.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_one_line_and_nothing_is_written(name, finished):
    contents = [b"{", b"[]", b"null", b"3", b"{}", b'"text"', b"[3]", b"\xff\xfe", b"sample\n", b"sample\tx\n"]
    if name == "chat.json":  # no questions asked
        contents = [content for content in contents if content not in (b"[]", b"{}")]
    if name == "eval/scores.json":
        contents.append(json.dumps({**SCORES, "sft": {**TASKS, "sample_qa": {"exact_match": None}}}).encode())
        contents.append(json.dumps({**SCORES, "sft": {**TASKS, "heldout_text": {"bits_per_byte": None}}}).encode())
    for content in contents:
        (finished / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            run("runs/summarize.py", "--run", finished)
    (finished / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        run("runs/summarize.py", "--run", finished)
    (finished / name).mkdir()
    with pytest.raises(UserError, match=name):
        run("runs/summarize.py", "--run", finished)
    assert not (finished / "summary.json").exists() and not (finished / "report.md").exists()
