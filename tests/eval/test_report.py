"""Tests of the report on results files as lm-eval writes them."""

import json
import math
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from result_files import write_results

from buddygpt.cli.errors import UserError
from buddygpt.eval import report
from buddygpt.eval.reporting import plots
from buddygpt.eval.reporting.page import to_markdown
from buddygpt.eval.reporting.results import read_runs
from buddygpt.eval.reporting.scores import equalize_kinds, read_outcomes, score_all


def test_few_shot_and_truncated_prompts_are_shown_by_task_and_checkpoint(tmp_path):
    write_results(tmp_path / "base", {"one": [0, 1], "two": [1, 1]}, n_shot=5, truncated_prompts={"one": 2, "two": 0})
    write_results(tmp_path / "plain", {"one": [0, 1]})
    table = to_markdown([report.prompt_table(["one", "two"], read_runs(tmp_path))])
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
    table = to_markdown([report.prompt_table(["exam"], read_runs(tmp_path))])
    assert "| exam | 0/5-shot, 3 truncated |" in table


def test_the_picture_has_readable_titles_and_one_scale(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots.plt, "close", lambda figure: drawn.update(axes=figure.axes[0]))
    results = {"exam_text": {"acc,none": 0.75, "alias": "multiple choice, by option text"}, "my_own_task": {}}
    for checkpoint in ("base", "sft"):
        write_results(tmp_path / checkpoint, {"exam_text": [1, 1, 0, 1], "my_own_task": [1]}, results=results)
    runs = read_runs(tmp_path)
    scores = {checkpoint: score_all(read_outcomes(of_checkpoint)) for checkpoint, of_checkpoint in runs.items()}
    plots.plot_scores(scores, runs, tmp_path / "scores.png")
    axes = drawn["axes"]
    titles = [" ".join(label.get_text().split()) for label in axes.get_xticklabels()]
    assert titles == ["multiple choice, by option text", "my own task"]
    assert max(len(line) for label in axes.get_xticklabels() for line in label.get_text().split("\n")) <= 18
    assert [bar.get_height() for bar in axes.patches] == [75, 100] * 2 and axes.get_ylim() == (0, 102)
    assert (tmp_path / "scores.png").stat().st_size > 10_000
    per_character = ("exam_text", "acc_norm")
    title = plots.bar_title(per_character, [("exam_text", "acc"), per_character], runs)
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


def test_scores_are_weighted_by_questions_and_bytes(tmp_path):
    groups = {"exam": ["exam_a", "exam_b"]}
    texts = {"exam_a": [[-8, 4], [-2, 1]], "exam_b": [[-40, 45]]}
    more = {"group_subtasks": groups, "groups": {"exam": {}}}
    write_results(tmp_path / "texts", texts, metric="bits_per_byte", **more)
    write_results(tmp_path / "marks", {"exam_a": [1, 0, 1], "exam_b": [0]}, **more)
    scores = {name: score_all(read_outcomes(runs)) for name, runs in read_runs(tmp_path).items()}
    bits = scores["texts"]["exam"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(1 / math.log(2)) and bits["n"] == 3 and bits["chance"] is None
    assert bits["ci95"][0] < bits["value"] < bits["ci95"][1]
    assert scores["texts"]["exam/b"]["bits_per_byte"]["ci95"] is None  # a single question
    assert scores["marks"]["exam"]["acc"]["value"] == 0.5 and scores["marks"]["exam"]["acc"]["n"] == 4


def test_a_figure_that_the_questions_do_not_give_has_no_interval(tmp_path):
    path = write_results(tmp_path / "base", {"one": [0.5, 0.2, 0.3]}, metric="f1")
    results = json.loads(path.read_text())
    for figure, ci95 in ((1 / 3, True), (0.8, False)):  # the mean; what sklearn might say
        results["results"]["one"]["f1,none"] = figure
        path.write_text(json.dumps(results))
        score = score_all(read_outcomes(read_runs(tmp_path)["base"]))["one"]["f1"]
        assert score["value"] == pytest.approx(figure) and bool(score["ci95"]) == ci95


def test_numbers_that_happen_to_be_0_or_1_are_no_shares(tmp_path):
    write_results(tmp_path / "base", {"one": [0.5, 1, 0.9]}, metric="distinct")
    write_results(tmp_path / "sft", {"one": [1, 1, 1]}, metric="distinct")
    outcomes = {name: read_outcomes(runs) for name, runs in read_runs(tmp_path).items()}
    equalize_kinds(outcomes.values())
    base, sft = (score_all(outcomes[name])["one"]["distinct"] for name in ("base", "sft"))
    assert (base["kind"], sft["kind"]) == ("number", "number") and base["ci95"][0] < 0.8 < base["ci95"][1]
    assert (sft["value"], sft["ci95"]) == (1, None)  # nothing varies, so nothing is known


def test_options_asked_without_their_question_are_no_options(tmp_path):
    requests = [{"arg_0": prompt, "arg_1": answer} for prompt in ("2+2=", "") for answer in "45"]
    write_results(tmp_path / "base", {"one": [1, 0]}, rows={"arguments": dict(enumerate(requests))})
    assert score_all(read_outcomes(read_runs(tmp_path)["base"]))["one"]["acc"]["chance"] == 0.5


def make_report(folder, monkeypatch, *arguments):
    places = ["--results", folder / "results", "--output", folder / "out/report.md"]
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, [*places, *arguments])])
    report.main()
    read = {path.name: path.read_text(encoding="utf-8") for path in (folder / "out").glob("*.[hjm]*")}
    return read["report.md"], read["report.html"], json.loads(read["comparisons.json"])


@pytest.mark.slow
def test_steps_of_a_run_become_curves_and_averages(tmp_path, monkeypatch):
    right = {900: 4, 1000: 6, 1100: 10}
    for step, n in right.items():
        write_results(tmp_path / "results" / f"base@{step}", {"one": [1] * n + [0] * (10 - n), "two": [0, 1] * 5})
    for seed in (1, 2):
        write_results(tmp_path / "results" / f"sft-seed{seed}", {"one": [1] * (9 - seed) + [0] * (seed + 1)})
    text, page, comparisons = make_report(tmp_path, monkeypatch, "--average", "sft=sft-seed*", "--last", 2)
    assert "| base (mean of last 2) | one | acc | 10 | 80.0% [" in text and "| 28.3 points |" in text
    assert "| sft (mean of 2) | one | acc | 10 | 75.0% [" in text and "| 7.1 points |" in text
    assert "The accuracy of all checkpoints is at chance in two:" in text
    assert "| task | metric | n | chance | base@900 | base@1000 | base@1100 |" in text  # by number, not by name
    assert [pair["b"] for pair in comparisons if pair["a"] == "base@1100"][:2] == ["sft-seed1", "sft-seed2"]
    assert not any("base@900" in (pair["a"], pair["b"]) for pair in comparisons)
    assert page.count("data:image/png;base64,") == 2 and (tmp_path / "out/scores_by_step.png").stat().st_size > 10_000


HOSTILE = (
    "<script>alert(1)</script></details>|a|`b`\u202eevil\x1b[31m\n# [x](https://evil.org) <img src=//e> \ud800 **b**"
)


@pytest.mark.slow
def test_hostile_answers_break_no_page(tmp_path, monkeypatch):
    rows = {
        "doc": {"subject": HOSTILE},
        "target": HOSTILE,
        "arguments": {"gen_args_0": {"arg_0": HOSTILE, "arg_1": {}}},
        "filtered_resps": [HOSTILE],
    }
    for name in ("base", "<b>sft"):
        write_results(tmp_path / "results" / name, {"one": [0, 1, 0]}, metric="exact_match", rows=rows)
    text, page, _ = make_report(tmp_path, monkeypatch)

    class Page(HTMLParser):
        open_tags, seen = [], []

        def handle_starttag(self, tag, attributes):
            self.seen.append((tag, dict(attributes)))
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_startendtag(self, tag, attributes):
            self.handle_starttag(tag, attributes)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    for content in (page, MarkdownIt("commonmark", {"html": True}).enable("table").render(text)):
        parser = Page()
        parser.seen, parser.open_tags = [], []
        parser.feed(content)
        assert not parser.open_tags
        tags = [tag for tag, _ in parser.seen]
        assert (
            not {"script", "a", "b", "strong" if content is page else "a"} & set(tags) and tags.count("details") == 2
        )
        assert all(not attributes.get("src", "").startswith(("//", "http")) for _, attributes in parser.seen)
        assert not set(content) & set("\u202e\x1b\ud800") and "alert(1)" in content
    rows = [line for line in text.splitlines() if "alert(1)" in line]
    assert len(rows) == 3 and all(row.startswith("| ") and row.endswith(" |") for row in rows)


@pytest.mark.slow
def test_what_cannot_be_averaged_or_compared_is_one_line(tmp_path, monkeypatch):
    for name in ("base", "sft"):
        write_results(tmp_path / "results" / name, {"one": [1, 0]})
    for arguments, match in {
        ("--baseline", "bas"): "baseline: `bas` was not evaluated; did you mean `base`",
        ("--average", "x=sft"): "average: `x=sft` is not LABEL=NAME,NAME",
        ("--average", "base,sft"): "average: `base,sft` is not LABEL=NAME,NAME",
        ("--last", "-1"): "last is -1",
        ("--shards", str(tmp_path / "nothing")): "is not a folder of token shards",
    }.items():
        with pytest.raises(UserError, match=match):
            make_report(tmp_path, monkeypatch, *arguments)
        assert not (tmp_path / "out").exists()
