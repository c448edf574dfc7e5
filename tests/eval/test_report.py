"""Tests of the report on results files as lm-eval writes them."""

import json

import pytest

from buddygpt.cli.errors import UserError
from buddygpt.eval import report


def write_results(folder, scores, n_shot=0, time="2026-01-01T00-00-00", **more):
    """Write a results file with one metric, `acc`, for each question of the tasks in `scores`."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, values in scores.items():
        rows = []
        for number, value in enumerate(values):
            row = {"doc_id": number, "doc": {}, "arguments": {"a": {}, "b": {}}, "metrics": ["acc"], "filter": "none"}
            rows.append(json.dumps(row | {"acc": value}) + "\n")
        (folder / f"samples_{task}_{time}.jsonl").write_text("".join(rows), encoding="utf-8")
    results = {
        "results": {task: {"acc,none": sum(values) / len(values)} for task, values in scores.items()},
        "group_subtasks": {},
        "n-shot": dict.fromkeys(scores, n_shot),
        "config": {"model_args": {"pretrained": "model"}, "limit": None},
        "lm_eval_version": "0.4.13",
    }
    path = folder / f"results_{time}.json"
    path.write_text(json.dumps(results | more), encoding="utf-8")
    return path


def test_few_shot_and_truncated_prompts_are_shown_by_task_and_checkpoint(tmp_path):
    write_results(tmp_path / "base", {"one": [0, 1], "two": [1, 1]}, n_shot=5, truncated_prompts={"one": 2, "two": 0})
    write_results(tmp_path / "plain", {"one": [0, 1]})
    runs = report.read_runs(tmp_path)
    table = report.prompt_table(["one", "two"], runs)
    assert "| one | 5-shot, 2 truncated | 0-shot, not counted |" in table
    assert "| two | 5-shot, 0 truncated |  |" in table


def test_the_subjects_of_a_group_share_a_cell(tmp_path):
    subtasks = {"exam": ["exam_a", "exam_b"]}
    values = {"exam_a": [0, 1], "exam_b": [1, 1]}
    path = write_results(
        tmp_path / "base", values, group_subtasks=subtasks, truncated_prompts={"exam_a": 2, "exam_b": 1}
    )
    results = json.loads(path.read_text())
    results |= {"groups": {"exam": {}}, "n-shot": {"exam_a": 5, "exam_b": 0}}
    path.write_text(json.dumps(results))
    table = report.prompt_table(["exam"], report.read_runs(tmp_path))
    assert "| exam | 0/5-shot, 3 truncated |" in table


def test_the_picture_has_readable_titles_and_one_scale(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report.plt, "close", lambda figure: drawn.update(axes=figure.axes[0]))
    results = {"exam_text": {"acc,none": 0.75, "alias": "multiple choice, by option text"}, "my_own_task": {}}
    for checkpoint in ("base", "sft"):
        write_results(tmp_path / checkpoint, {"exam_text": [1, 1, 0, 1], "my_own_task": [1]}, results=results)
    runs = report.read_runs(tmp_path)
    scores = {checkpoint: report.score_tasks(of_checkpoint) for checkpoint, of_checkpoint in runs.items()}
    report.plot(scores, runs, tmp_path / "scores.png")
    axes = drawn["axes"]
    titles = [" ".join(label.get_text().split()) for label in axes.get_xticklabels()]
    assert titles == ["multiple choice, by option text", "my own task"]
    assert max(len(line) for label in axes.get_xticklabels() for line in label.get_text().split("\n")) <= 18
    assert [bar.get_height() for bar in axes.patches] == [75, 100] * 2 and axes.get_ylim() == (0, 102)
    assert (tmp_path / "scores.png").stat().st_size > 10_000
    per_character = ("exam_text", "acc_norm")
    title = report.bar_title(per_character, [("exam_text", "acc"), per_character], runs)
    assert " ".join(title.split()) == "multiple choice, by option text (per character)"


SAMPLES = "samples_one_2026-01-01T00-00-00.jsonl"
RESULTS = "results_2026-01-01T00-00-00.json"
ROW = {"doc_id": 0, "doc": {}, "arguments": {"a": {}, "b": {}}, "metrics": ["acc"], "filter": "none", "acc": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[
            (RESULTS, content)
            for content in ("", "{", "[]", "null", "3", '"text"', "{}", "[" * 100_000, b"\xff\xfe{}")
        ],
        *[
            (RESULTS, {key: value})
            for key in ("results", "group_subtasks", "n-shot", "config")
            for value in (None, [1])
        ],
        (RESULTS, {"results": {"one": None}}),
        (RESULTS, {"results": {"one": {"acc,none": None}}, "config": {}}),
        (RESULTS, {"group_subtasks": {"one": ["one"]}, "groups": {"one": {}}, "results": {}}),
        (RESULTS, {"group_subtasks": {"one": ["two"], "two": ["two"]}}),
        (RESULTS, {"config": {"model_args": "pretrained=model", "limit": None}}),
        (RESULTS, {"config": {"model_args": {"pretrained": "model"}, "limit": "all"}}),
        (RESULTS, {"truncated_prompts": {"two": 1}}),
        (RESULTS, {"n-samples": {"one": {"effective": 2}}}),
        *[(SAMPLES, content) for content in ("", "{", "[]\n", "3\n", "{}\n", b"\xff\xfe{}\n")],
        *[(SAMPLES, json.dumps({**ROW, key: None})) for key in ("doc", "arguments", "metrics", "filter", "acc")],
        (SAMPLES, json.dumps({**ROW, "metrics": ["f1"]})),
    ],
)
def test_a_damaged_file_is_one_line_and_nothing_is_written(name, content, tmp_path, monkeypatch):
    path = write_results(tmp_path / "results/base", {"one": [1]})
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    (path.parent / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--results", tmp_path / "results", "--output", tmp_path / "out/report.md"]
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
    with pytest.raises(UserError, match="2026-01-01T00-00-00.json"):
        report.main()
    assert not (tmp_path / "out").exists()
