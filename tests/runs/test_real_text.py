"""runs/real_text.sh takes any text, and rows and exams as options. The commands are recorded, not run."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def chain(tmp_path):
    """Return a function that runs the script in a copy of the project, with recorders for python and accelerate."""
    for folder in ("runs", "bin", "my text", "cmmlu"):
        (tmp_path / folder).mkdir()
    for name in ("real_text.sh", "stages.sh"):
        shutil.copy(ROOT / "runs" / name, tmp_path / "runs")
    for name in ("chat one.json", "chat2.jsonl"):
        (tmp_path / name).touch()
    for name in ("python", "accelerate"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\nprintf "|%s" {name} "$@" >> {tmp_path}/log\necho >> {tmp_path}/log\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)

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
    scripts = [next(word for word in words if word.endswith(".py")) for words in commands]
    assert scripts[0] == "data/sample/make_sample.py" and scripts[-1] == "export/to_native.py"
    assert "eval/local_exams.py" not in scripts and scripts.count("data/convert_chat.py") == 2
    by_script = dict(zip(scripts, commands, strict=True))
    shards, exam = by_script["data/prepare_pretrain.py"], by_script["eval/run_eval.py"]
    assert shards[shards.index("--sources") + 1 :][:3] == [f"{tmp_path}/my text", "--text_key", "text"]
    assert shards[-4:] == ["--eval_fraction", "0.005", "--decontaminate", "null"]
    assert exam[exam.index("--tasks") + 1 :] == ["heldout_text", "--include_path", "null"]


def test_rows_and_exams_are_options(chain, tmp_path):
    files = ["--instructions", "chat one.json", "chat2.jsonl", "--preferences", "chat2.jsonl"]
    done, commands = chain(
        "my text", *files, "--cmmlu", str(tmp_path / "cmmlu"), "--text_column", "content", "--eval_fraction", "0.1"
    )
    assert done.returncode == 0, done.stderr
    by_script = {next(word for word in reversed(words) if word.endswith(".py")): words for words in reversed(commands)}
    assert "data/sample/make_sample.py" not in by_script
    rows = by_script["data/convert_chat.py"]
    assert rows[rows.index("--input") + 1 :][:2] == [f"{tmp_path}/chat one.json", f"{tmp_path}/chat2.jsonl"]
    exam = by_script["eval/run_eval.py"]
    assert exam[exam.index("--tasks") + 1 :] == ["heldout_text", "cmmlu", "--include_path", "outputs/real_text/tasks"]
    assert by_script["data/prepare_pretrain.py"][-3:] == ["0.1", "--decontaminate", f"{tmp_path}/cmmlu"]
    assert by_script["tokenizer/train_tokenizer.py"][-1] == "content"


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
