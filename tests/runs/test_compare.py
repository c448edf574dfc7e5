"""The tables of methods: intervals, gains on the same questions, length, repetition, ends and CPU seconds."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT, run
from tiny_tokenizer import train_tiny_tokenizer

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError

SCORE = {"value": 0.5, "n": 4, "ci95": [0.15, 0.85]}
ANSWERS = {"sft": ["a", "no", "no", "no"], "dpo": ["a", "b", "no no no no no", "x " * 16]}
CALLS = {"tools_more": ["a", "no", "no", "no"], "tools_grpo": ["a", "b", "b", "no"]}


def make_run(folder):
    tokenizer = train_tiny_tokenizer(folder)
    for results, task, answers in (("eval", "sample_qa", ANSWERS), ("eval-calls", "sample_calls", CALLS)):
        scores = {name: {task: {"exact_match": SCORE}, "sample_pairs": {"acc": SCORE}} for name in sorted(answers)}
        for name, texts in answers.items():
            shutil.copytree(tokenizer, folder / name)
            (folder / results / name).mkdir(parents=True)
            rows = []
            for number, text in enumerate(texts):
                arguments = {"gen_args_0": {"arg_0": "?", "arg_1": {"max_gen_toks": 12}}}
                is_exact = float(text == "ab"[min(number, 1)])
                rows.append({"doc_id": number, "resps": [[text]], "arguments": arguments, "exact_match": is_exact})
            lines = "\n".join(map(json.dumps, rows))
            (folder / results / name / f"samples_{task}_2026.jsonl").write_text(lines)
        (folder / results / "scores.json").write_text(json.dumps(scores))
    lines = ["sft\t5\tdone\t4", "dpo\t10\tstopped\t8", "dpo\t20\tdone\t15", "tools_more\t9\tdone\t7"]
    (folder / "seconds.tsv").write_text("\n".join(lines) + "\n")


def test_the_table_of_methods(tmp_path, capsys):
    make_run(tmp_path)
    run("runs/compare.py", "--run", tmp_path)
    written = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in written["answers"]}
    assert list(rows) == ["sft", "dpo"] and rows["sft"]["gain"] is None
    assert rows["dpo"]["gain"] == pytest.approx([0.25, 0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25], abs=1e-3)
    assert rows["dpo"]["repeats"][0] == 0.5 and rows["sft"]["repeats"][0] == 0
    assert rows["dpo"]["ends"][0] < 1 == rows["sft"]["ends"][0]
    assert rows["sft"]["ends"][1:] == pytest.approx([0.51, 1], abs=0.01)  # the Wilson interval of 4 of 4
    assert (rows["sft"]["cpu_seconds"], rows["dpo"]["cpu_seconds"]) == (4, 23)
    calls = {row["method"]: row for row in written["calls"]}
    assert list(calls) == ["tools_more", "tools_grpo"] and calls["tools_grpo"]["gain"][0] == 0.5
    assert (calls["tools_more"]["cpu_seconds"], calls["tools_grpo"]["cpu_seconds"]) == (7, None)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and "| dpo | 50.0% [15.0%, 85.0%] | +25.0 [-24.0, +74.0] |" in table
    assert "| method | exact calls (n = 4) | gain, points | tokens | end | CPU seconds |" in table


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="is not a finished run of runs/alignment.sh"):
        run("runs/compare.py", "--run", tmp_path)
    make_run(tmp_path)
    scores = tmp_path / "eval" / "scores.json"
    whole = scores.read_text()
    scores.write_text(json.dumps({"dpo": {}}))
    with pytest.raises(UserError, match="eval: sft was not evaluated; there are dpo"):
        run("runs/compare.py", "--run", tmp_path)
    scores.write_text(whole)
    shutil.rmtree(tmp_path / "eval" / "dpo")
    with pytest.raises(UserError, match="dpo holds no samples_sample_qa"):
        run("runs/compare.py", "--run", tmp_path)


STUB = """#!/usr/bin/env bash
printf '%s\\x1f' "$(basename "$0")" "$@" >> "$COMMANDS"; echo >> "$COMMANDS"
"""


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["alignment", "tools"])
def test_the_commands_of_a_chain_have_scripts_configs_and_known_options(chain, tmp_path, monkeypatch):
    """Stubs record the commands; then each is parsed by its own script, up to the point where the work would start."""

    class Parsed(Exception):
        pass

    def parse_only(*args, **kwargs):
        parse_arguments(*args, **kwargs)
        raise Parsed

    for name in ("python", "accelerate"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    for file in ("pretrain/config.json", "sft/config.json", "sample/qa_test.jsonl"):
        (tmp_path / "quickstart" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "quickstart" / file).touch()
    recorded = tmp_path / "commands"
    places = {"FROM": str(tmp_path / "quickstart"), "OUT": str(tmp_path / "out"), "COMMANDS": str(recorded)}
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", f"runs/{chain}.sh"], cwd=ROOT, env=os.environ | places | {"PATH": path}, check=True)

    monkeypatch.setattr("buddygpt.cli.arguments.parse_arguments", parse_only)
    commands = [line.split("\x1f")[1:-1] for line in recorded.read_text().splitlines()]
    for words in commands:
        number = next(i for i, word in enumerate(words) if word.endswith(".py"))
        with pytest.raises(Parsed):
            run(words[number], *words[number + 1 :])
    names = [line.split("\t")[0] for line in (tmp_path / "out" / "seconds.tsv").read_text().splitlines()]
    assert len(names) == len(set(names)) and len(commands) >= len(names) > 4


def test_a_chain_needs_a_finished_quickstart(tmp_path):
    for chain in ("alignment", "tools"):
        places = {"FROM": str(tmp_path / "none"), "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            ["bash", f"runs/{chain}.sh"], cwd=ROOT, env=os.environ | places, capture_output=True, text=True
        )
        assert done.returncode == 2 and "run make quickstart first" in done.stderr and not (tmp_path / "out").exists()
