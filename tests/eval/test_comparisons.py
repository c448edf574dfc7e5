"""Comparisons of models on the same questions: matching, verdicts, joined reports."""

import json

import pytest
from conftest import run
from result_files import TIME, write_results

from buddygpt.cli.errors import UserError
from buddygpt.eval.reporting.comparisons import compare_outcomes, compared_pairs
from buddygpt.eval.reporting.results import read_runs
from buddygpt.eval.reporting.scores import read_outcomes


def outcomes(folder):
    return read_outcomes(read_runs(folder.parent)[folder.name])


def compared(tmp_path, a, b, **more):
    write_results(tmp_path / "a", a, **more)
    write_results(tmp_path / "b", b, **more)
    return compare_outcomes(outcomes(tmp_path / "a"), outcomes(tmp_path / "b"))


def test_only_common_questions_are_compared(tmp_path):
    a = {number: int(number < 5) for number in range(20)}  # right: 0 to 4
    b = {number: int(number < 25) for number in range(10, 40)}  # right: 10 to 24
    (row,) = compared(tmp_path, {"one": a}, {"one": b})
    assert (row["n"], row["n_a"], row["n_b"]) == (10, 20, 30)
    assert (row["a"], row["b"], row["difference"], row["verdict"]) == (0, 1, 1, "better")
    assert row["p"] == pytest.approx(2 / 2**10)


def test_questions_are_matched_by_their_content(tmp_path):
    write_results(tmp_path / "a", {"one": [1, 0, 1]})
    write_results(tmp_path / "b", {"one": [0, 1, 1]})
    for name, hashes in {"a": "xyz", "b": "yzw"}.items():  # question 1 of a is question 0 of b
        file = tmp_path / name / f"samples_one_{TIME}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"doc_hash": hashes[row["doc_id"]]}) + "\n" for row in rows))
    (row,) = compare_outcomes(outcomes(tmp_path / "a"), outcomes(tmp_path / "b"))
    assert (row["n"], row["a"], row["b"], row["verdict"]) == (2, 0.5, 0.5, "cannot tell")  # 0, 1 and 0, 1


def test_without_common_questions_there_is_no_verdict(tmp_path):
    (row,) = compared(tmp_path, {"one": {0: 1}}, {"one": {1: 1}})
    assert row["n"] == 0 and row["difference"] is None and row["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("metric", "higher_is_better", "verdict"),
    [("bits_per_byte", False, "better"), ("n_chars", True, "lower"), ("distinct", True, "worse")],
)
def test_verdicts_know_the_direction_of_a_metric(metric, higher_is_better, verdict, tmp_path):
    sizes = range(10, 30)
    if metric == "bits_per_byte":
        a, b = ([[-scale * size, size] for size in sizes] for scale in (2, 1.8))
    else:
        a, b = ([scale * size for size in sizes] for scale in (2, 1.8))
    direction = {"one": {metric: higher_is_better}}
    (row,) = compared(tmp_path, {"one": a}, {"one": b}, metric=metric, higher_is_better=direction)
    assert row["verdict"] == verdict and row["ci95"][0] <= row["difference"] <= row["ci95"][1] < 0
    assert row["difference"] == pytest.approx(row["b"] - row["a"])


def test_each_model_is_compared_with_the_baseline_and_with_the_one_before():
    assert compared_pairs(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert compared_pairs(["a", "b", "c"], "c") == [("c", "a"), ("c", "b"), ("a", "b")]
    steps = ["base@1", "base@2", "sft"]
    assert compared_pairs(steps) == [("base@2", "sft")]
    assert compared_pairs(steps, "base@1") == [("base@1", "base@2"), ("base@1", "sft"), ("base@2", "sft")]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Results of ours (base, sft), of another model, and the scores of the latter alone."""
    folder = tmp_path_factory.mktemp("compare")
    write_results(folder / "ours/base", {"one": [1] * 10 + [0] * 30})
    write_results(folder / "ours/sft", {"one": [1] * 35 + [0] * 5}, n_shot=5)
    write_results(folder / "theirs/base", {"one": [1] * 12 + [0] * 28})
    score = {"value": 35 / 40, "n": 40, "ci95": [0.739, 0.945], "chance": 0.25}
    (folder / "scores.json").write_text(json.dumps({"sft": {"one": {"acc": score}}}))
    return folder


def test_reports_are_joined_against_a_baseline(evaluations, tmp_path, capsys):
    places = [f"ours={evaluations}/ours", f"theirs={evaluations}/theirs", f"old={evaluations}/scores.json"]
    run("eval/compare.py", "--results", *places, "--baseline", "ours/base", "--output", tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and "<table>" in (tmp_path / "table.html").read_text(encoding="utf-8")
    pairs = {pair["b"]: pair["rows"][0] for pair in json.loads((tmp_path / "table.json").read_text())}
    assert {name: row["verdict"] for name, row in pairs.items()} == {
        "ours/sft": "better",
        "theirs/base": "cannot tell",
        "old/sft": "better",
    }
    paired, alone = pairs["ours/sft"], pairs["old/sft"]
    assert paired["paired"] and not alone["paired"] and "which is careful" in text
    assert alone["difference"] == pytest.approx(paired["difference"])
    assert "| one | 0-shot, bare text | 5-shot, bare text | 0-shot, bare text | unknown |" in text


def test_mistakes_are_told_in_one_line(evaluations, tmp_path):
    ours, theirs = f"{evaluations}/ours", f"{evaluations}/theirs"
    write_results(tmp_path / "other/base", {"two": [1]})
    bad = ["[]", '{"a": {"b": {"c": {"value": 1}}}}', "{", "{}"]
    for number, content in enumerate(bad):
        (tmp_path / f"{number}.json").write_text(content)
    for places, match in [
        ([ours, theirs], "`base` is in two of them; give LABEL=PATH, such as new="),
        ([theirs], "there is only base"),
        ([ours, "--baseline", "bsae"], "baseline: there is no model `bsae`; did you mean `base`"),
        ([ours, "/nowhere"], "there is no /nowhere"),
        ([ours, "--output", f"{tmp_path}/table.json"], "table.json is no Markdown file; give FILE.md"),
        ([theirs, f"x={tmp_path}/other"], "no other model has a score of the same task and metric as base"),
    ]:
        with pytest.raises(UserError, match=match):
            run("eval/compare.py", "--results", *places)
    for number in range(len(bad)):
        with pytest.raises(UserError, match=f"{number}.json is damaged"):
            run("eval/compare.py", "--results", ours, f"x={tmp_path}/{number}.json")
