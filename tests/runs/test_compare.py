"""The table of methods: intervals, gains on the same questions, length, repetition, ends and seconds."""

import json
import shutil

import pytest
from conftest import ROOT, run
from tiny_tokenizer import train_tiny_tokenizer

from buddygpt.cli.errors import UserError

SCORE = {"value": 0.5, "n": 4, "ci95": [0.15, 0.85]}
ANSWERS = {"sft": ["a", "no", "no", "no"], "dpo": ["a", "b", "no no no no no", "x " * 16]}


def make_run(folder):
    scores = {name: {"sample_qa": {"exact_match": SCORE}, "sample_pairs": {"acc": SCORE}} for name in ("dpo", "sft")}
    tokenizer = train_tiny_tokenizer(folder)
    for name in ANSWERS:
        shutil.copytree(tokenizer, folder / name)
    for name, answers in ANSWERS.items():
        (folder / "eval" / name).mkdir(parents=True)
        rows = []
        for number, text in enumerate(answers):
            arguments = {"gen_args_0": {"arg_0": "?", "arg_1": {"max_gen_toks": 12}}}
            is_exact = float(text == "ab"[min(number, 1)])
            rows.append({"doc_id": number, "resps": [[text]], "arguments": arguments, "exact_match": is_exact})
        lines = "\n".join(map(json.dumps, rows))
        (folder / "eval" / name / "samples_sample_qa_2026.jsonl").write_text(lines)
    (folder / "eval" / "scores.json").write_text(json.dumps(scores))
    (folder / "seconds.tsv").write_text("sft\t5\tdone\ndpo\t10\tstopped\ndpo\t20\tdone\n")


def test_the_table_of_methods(tmp_path, capsys):
    make_run(tmp_path)
    run("runs/compare.py", "--run", tmp_path)
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert list(rows) == ["sft", "dpo"] and rows["sft"]["gain"] is None
    assert rows["dpo"]["gain"] == pytest.approx([0.25, 0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25], abs=1e-3)
    assert rows["dpo"]["repeats"][0] == 0.5 and rows["sft"]["repeats"][0] == 0
    assert rows["dpo"]["ends"][0] < 1 == rows["sft"]["ends"][0]
    assert rows["sft"]["ends"][1:] == pytest.approx([0.51, 1], abs=0.01)  # the Wilson interval of 4 of 4
    assert (rows["sft"]["seconds"], rows["dpo"]["seconds"]) == (5, 30)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and "| dpo | 50.0% [15.0%, 85.0%] | +25.0 [-24.0, +74.0] |" in table


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="is not a finished run of runs/alignment.sh"):
        run("runs/compare.py", "--run", tmp_path)
    make_run(tmp_path)
    with pytest.raises(UserError, match="start: pretrain was not evaluated; there are dpo, sft"):
        run("runs/compare.py", "--run", tmp_path, "--start", "pretrain")
    shutil.rmtree(tmp_path / "eval" / "dpo")
    with pytest.raises(UserError, match="dpo holds no samples_sample_qa"):
        run("runs/compare.py", "--run", tmp_path)


def test_configs_and_scripts_of_the_comparison_exist():
    words = (ROOT / "runs/alignment.sh").read_text(encoding="utf-8").split()
    files = [
        word for word in words if word.endswith((".py", ".yaml")) and "/" in word and not word.startswith(("$", '"'))
    ]
    assert len(files) > 15
    for file in files:
        assert (ROOT / file).is_file(), file
