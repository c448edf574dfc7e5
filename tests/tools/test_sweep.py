"""The sweep: the neighbours of the rules' choice, runs of equal time through the real recipe, and their table."""

import json

import pytest
import sweep
from conftest import run

from buddygpt.cli.errors import UserError
from buddygpt.planning import rules

CENTER = sweep.choose(2, 55e9, 49e6)


def test_every_neighbour_differs_in_what_its_name_says():
    found = {each.name: each for each in sweep.candidates(CENTER, list(sweep.AXES))}
    shape, rate = CENTER.shape, CENTER.rate
    assert found.pop("rules") == CENTER and len(found) == 10  # no shape is narrower
    assert found["rate x 0.5"].rate == rate / 2 and found["rate x 0.5"].shape == shape
    assert found["embedding's rate 1 x Muon's"].embedding == 1
    assert found["batch x 2"].batch == 2 * CENTER.batch and found["batch x 2"].rate >= rate
    wider, deeper = (next(found[name] for name in found if name.startswith(word)) for word in ("wider", "deeper"))
    assert wider.shape.hidden_size > shape.hidden_size and wider.rate <= rate
    assert deeper.shape.num_hidden_layers == 6 and deeper.shape.hidden_size == shape.hidden_size
    assert found["vocabulary 8,192"].shape.vocab_size == 8192
    assert len({str(each.key) for each in [CENTER, *found.values()]}) == 11  # none would be taken for another


def test_only_what_the_time_of_a_step_depends_on_needs_a_probe():
    faster, larger = sweep.candidates(CENTER, ["rate", "batch"])[1:4:2]
    assert faster.step_key == CENTER.step_key != larger.step_key


def test_the_verdict_compares_the_rules_with_the_best():
    rate = sweep.candidates(CENTER, ["rate"])[1]
    found = [(CENTER, {"bits_per_byte": 2.01}), (rate, {"bits_per_byte": 2.0})]
    assert sweep.verdict(found, 2.0, 2) == "The rules' choice is 0.5% from the best, within the goal of 1%."
    found[0][1]["bits_per_byte"] = 2.1
    assert "5.0% from the best, **outside** the goal of 1%. Not run yet: 1." in sweep.verdict(found, 2.0, 3)


@pytest.mark.slow
def test_runs_of_the_same_time_go_through_the_recipe_and_into_the_table(workspace, tmp_path, monkeypatch, capsys):
    for name in ("tokenizer", "shards"):
        (tmp_path / f"{name}-512").symlink_to(workspace / name)
    monkeypatch.setattr(rules, "vocabulary", lambda text_bytes, width=None: 512)
    words = ["--text", workspace / "sample/pretrain.jsonl", "--minutes", 0.05, "--vary", "rate", "--work", tmp_path]
    run("tools/benchmarks/sweep.py", *words)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 3 and len({result["steps"] for result in results}) == 1
    assert len({result["key"][-2] for result in results}) == 3  # the rates
    assert all(0 < result["bits_per_byte"] < 8 and result["cpu_seconds"] > 0 for result in results)
    table = (tmp_path / "sweep.md").read_text()
    assert table.count("| rate x ") == 2 and "The rules' choice is " in table and (tmp_path / "sweep.png").exists()

    capsys.readouterr()
    run("tools/benchmarks/sweep.py", *words)  # finished runs are not repeated
    assert "bits per byte" not in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(tmp_path):
    (tmp_path / "little.txt").write_text("little\n" * 100)
    with pytest.raises(UserError, match="give at least a few MB"):
        run("tools/benchmarks/sweep.py", "--text", tmp_path, "--work", tmp_path / "work")
    with pytest.raises(UserError, match="vary is widths; use rate"):
        run("tools/benchmarks/sweep.py", "--text", tmp_path, "--vary", "widths")
