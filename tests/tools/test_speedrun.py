"""The speedrun: attempts build on each other, a run counts its seconds and tokens, tables follow from the results."""

import json
from statistics import median

import minimind
import pytest
import speedrun
import yaml
from conftest import ROOT, run
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError


def test_every_attempt_of_the_table_says_what_it_was():
    attempts, target = speedrun.read_attempts()
    results = speedrun.read_results()
    assert {result["attempt"] for result in results} <= attempts.keys()
    for result in results:
        attempt = attempts[result["attempt"]]
        assert attempt.was_removed == ("scratch" in result)
        assert [result[key] for key in ("options", "model", "tokens")] == [
            *(attempt.options, attempt.model, attempt.tokens)
        ], attempt.name
    page = speedrun.PAGE.read_text(encoding="utf-8")
    assert speedrun.race_table(attempts, results, target) in page
    assert speedrun.screening_table(attempts, results) in page


def evaluations(*rows):
    keys = ("tokens", "cpu_seconds", "bits_per_byte")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def test_a_race_ends_at_the_first_evaluation_at_or_below_the_target(tmp_path):
    entry = {"what": "x", "tokens": 100}
    content = {"target": 2.0, "model": {}, "options": {"a": 1}, "races": {"one": entry}}
    content["screening"] = {"short": {"base": "one", "what": "y", "options": {"b": 2}, "tokens": 50}}
    content["screening"]["other"] = {"base": "short", "what": "z", "model": {"c": 3}, "kept": "no"}
    (tmp_path / "attempts.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    attempts, target = speedrun.read_attempts(tmp_path / "attempts.yaml")
    assert attempts["other"].options == {"a": 1, "b": 2} and attempts["other"].tokens == 50

    fast = evaluations((1e6, 10.0, 2.1), (2e6, 20.0, 2.0), (3e6, 30.0, 1.9))
    results = [{"attempt": "one", "seed": 1, "commit": "abc", "evaluations": fast}]
    assert "| 1 | 2.00 M | 20 | 1.900 | abc |" in speedrun.race_table(attempts, results, target)
    slow = evaluations((1e6, 12.0, 2.2), (3e6, 36.0, 2.01))
    results.append({"attempt": "one", "seed": 2, "commit": "abc", "evaluations": slow})
    assert "| 2 | not reached by 1 | not reached by 1 | 1.955 [1.900, 2.010] | abc |" in speedrun.race_table(
        attempts, results, target
    )
    for name, seed, end in [("short", 1, 2.5), ("short", 2, 2.6), ("other", 1, 2.4), ("other", 2, 2.45)]:
        results.append({"attempt": name, "seed": seed, "evaluations": evaluations((5e5, 5.0, end))})
    assert f"{median([-0.1, -0.15]):+.3f} [-0.150, -0.100]" in speedrun.screening_table(attempts, results)


def test_documents_are_cut_between_characters_and_nothing_is_lost(workspace):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    text = "龘靐齉爩 A longer document. 一份比一行更长的文档。" * 60
    pieces = list(minimind.cut(text, tokenizer))
    assert "".join(pieces) == text and len(pieces) > 3
    lengths = [len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces]
    assert max(lengths) <= minimind.LENGTH and min(lengths[:-1]) > minimind.LENGTH - 40
    decoded = set(minimind.decode(workspace / "shards/train", workspace / "tokenizer", 1))
    rows = (workspace / "sample/pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    assert decoded <= {json.loads(row)["text"] for row in rows} and len(decoded) > 0.9 * len(set(rows))


@pytest.mark.slow
def test_a_run_goes_through_the_recipe(workspace, tmp_path, monkeypatch):
    for name in ("tokenizer", "shards"):
        (tmp_path / f"{name}-512").symlink_to(workspace / name)
    model = json.loads((ROOT / "model/configs/debug.json").read_text())
    model["vocab_size"] = len(AutoTokenizer.from_pretrained(workspace / "tokenizer"))
    options = yaml.safe_load((ROOT / "tools/benchmarks/speedrun.yaml").read_text())["options"]
    attempt = speedrun.Attempt(
        "a", None, options | {"block_size": 64}, model, "recipe", 8 * 4 * 64, True, False, "x", ""
    )
    monkeypatch.setattr(speedrun, "folders", lambda work, vocab_size: (work / "tokenizer-512", work / "shards-512"))
    evaluations = speedrun.train(attempt, 1, tmp_path)
    assert [row["step"] for row in evaluations] == [4, 7, 8]
    assert [row["tokens"] for row in evaluations] == [1024, 1792, 2048]
    seconds = [row["cpu_seconds"] for row in evaluations]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    json.dumps(evaluations)


def test_mistakes_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="nonsense: not in speedrun.yaml, which has adamw, muon"):
        run("tools/benchmarks/speedrun.py", "--attempts", "nonsense")
    with pytest.raises(UserError, match="has no result with seed 99: give the folder of the text as --text"):
        run("tools/benchmarks/speedrun.py", "--attempts", "adamw", "--seeds", 99)
    with pytest.raises(UserError, match="has no trainer/train_pretrain.py: clone https"):
        minimind.train(tmp_path, tmp_path, tmp_path, tmp_path, {}, 1000, 1)
    with pytest.raises(UserError, match="no zh_.* file there"):
        run("tools/benchmarks/speedrun.py", "--seeds", 99, "--attempts", "adamw", "--text", tmp_path)
