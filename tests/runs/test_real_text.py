"""runs/real_text.sh is runs/new.py for a CPU, then runs/recipe.sh. The commands are recorded, not run."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def chain(tmp_path):
    """Return a function that runs the script in a copy of the project, with recorders for python and recipe.sh."""
    for folder in ("runs", "bin", "my text", "cmmlu"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "runs" / "real_text.sh", tmp_path / "runs")
    for name in ("chat one.json", "chat2.jsonl"):
        (tmp_path / name).touch()
    recorder = f'#!/bin/sh\nprintf "|%s" "$@" >> {tmp_path}/log\necho >> {tmp_path}/log\n'
    for path in (tmp_path / "bin" / "python", tmp_path / "runs" / "recipe.sh"):
        path.write_text(recorder)
        path.chmod(0o755)

    def run(*words):
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", "runs/real_text.sh", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        log = tmp_path / "log"
        return done, [line.split("|")[1:] for line in log.read_text().splitlines()] if log.exists() else []

    return run


def test_text_alone_is_enough(chain, tmp_path):
    done, commands = chain("my text")
    assert done.returncode == 0, done.stderr
    new = ["runs/new.py", "./outputs/real_text", "--gpu", "cpu", "--hours", "0.5", "--text", f"{tmp_path}/my text"]
    assert commands == [new, ["outputs/real_text"]]


def test_a_recipe_that_is_there_continues(chain, tmp_path):
    (tmp_path / "outputs" / "real_text").mkdir(parents=True)
    (tmp_path / "outputs" / "real_text" / "recipe.yaml").touch()
    assert chain("my text")[1] == [["outputs/real_text"]]


def test_rows_and_exams_are_options(chain, tmp_path):
    files = ["--instructions", "chat one.json", "chat2.jsonl", "--preferences", "chat2.jsonl"]
    more = ["--cmmlu", str(tmp_path / "cmmlu"), "--text_column", "content", "--eval_fraction", "0.1"]
    done, (new, _) = chain("my text", *files, *more)
    assert done.returncode == 0, done.stderr
    assert new[new.index("--chat") + 1 :][:2] == [f"{tmp_path}/chat one.json", f"{tmp_path}/chat2.jsonl"]
    assert new[-2:] == ["--pairs", f"{tmp_path}/chat2.jsonl"]
    for option, value in (("cmmlu", f"{tmp_path}/cmmlu"), ("text_column", "content"), ("eval_fraction", "0.1")):
        assert new[new.index(f"--{option}") + 1] == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a folder of text"),
        (["nowhere"], "there is no nowhere"),
        (["my text", "--sft", "x"], "unknown option --sft"),
    ],
)
def test_mistakes_are_one_line(chain, words, message):
    done, commands = chain(*words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not commands
