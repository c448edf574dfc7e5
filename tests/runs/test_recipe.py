"""runs/recipe.sh and its dry run: the stages of a folder in order, and what is wrong before anything runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

from buddygpt.cli.errors import UserError

CONFIGS = {
    "tokenizer": "tokenizer",
    "data": "data",
    "pretrain": "pretrain",
    "sft": "sft",
    "dpo": "rlhf",
}


@pytest.fixture
def chain(tmp_path):
    """Return a function that runs a recipe in a copy of the scripts, with recorders for python and accelerate."""
    for folder in ("runs", "bin", "recipe"):
        (tmp_path / folder).mkdir()
    for name in ("recipe.sh", "stages.sh"):
        shutil.copy(ROOT / "runs" / name, tmp_path / "runs")
    for name in ("python", "accelerate"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\n[ "$1" != -c ] || exec {sys.executable} "$@"\n'
            f'printf "|%s" {name} "$@" >> {tmp_path}/log\necho >> {tmp_path}/log\n[ ! -e {tmp_path}/stop-"$6" ]\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)

    def run_recipe(*words, **configs):
        for name, content in configs.items():
            (tmp_path / "recipe" / f"{name}.yaml").write_text(content)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "none"}
        command = ["bash", "runs/recipe.sh", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        log = tmp_path / "log"
        return done, [line.split("|")[1:] for line in log.read_text().splitlines()] if log.exists() else []

    return run_recipe


def script(words):
    return next(word for word in words if word.endswith(".py"))


def test_stages_with_a_file_run_in_order_and_are_not_repeated(chain, tmp_path):
    configs = {"recipe": "name: a\noutput: out\naccelerate_config: mine.yaml\n", "data": "output: s\n"}
    (tmp_path / "shared.yaml").write_text("output_dir: out/sft\n")
    configs |= {
        "sft": "defaults: ../shared.yaml\n",
        "pretrain": "output_dir: out/pretrain\n",
        "eval": "output: out/eval\n",
    }
    done, commands = chain("recipe", **configs)
    assert done.returncode == 0, done.stderr
    assert [script(words) for words in commands] == [
        *("data/prepare_pretrain.py", "pretrain/pretrain.py", "sft/sft.py", "eval/run_eval.py", "eval/report.py"),
        "export/to_native.py",
    ]
    assert commands[1][commands[1].index("--config_file") + 1] == "mine.yaml"
    assert commands[1][-2:] == ["--config", f"{tmp_path}/recipe/pretrain.yaml"]
    assert commands[-1][-4:] == ["--checkpoint", "out/sft", "--output", "out/native"]
    again, commands = chain("recipe")
    assert again.stdout.count("completed earlier") == 6 and len(commands) == 6


def test_stages_are_those_of_the_dry_run():
    text = (ROOT / "runs" / "recipe.sh").read_text(encoding="utf-8")
    found = re.findall(r"^run (\w+) (?:python|recipe) (\S+)(.*)$", text, re.MULTILINE)
    import importlib.util

    spec = importlib.util.spec_from_file_location("dry_run", ROOT / "runs" / "dry_run.py")
    module = sys.modules["dry_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stages = [(name, stage.script, tuple(stage.options)) for name, stage in module.STAGES.items()]
    assert stages == [(name, path, tuple(options.split())) for name, path, options in found]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a recipe folder"),
        (["nowhere"], "there is no nowhere/recipe.yaml"),
        (["recipe", "--dryrun"], "unknown option --dryrun"),
    ],
)
def test_mistakes_are_one_line(chain, words, message):
    done, commands = chain(*words, recipe="name: a\noutput: out\n")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not commands


@pytest.fixture
def debug(tmp_path, workspace):
    """A recipe folder of the debug configs, on the sample of the tests."""
    folder = tmp_path / "debug"
    folder.mkdir()
    for name, source in CONFIGS.items():
        text = (ROOT / source / "configs" / "debug.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(text.replace("outputs/debug/sample", str(workspace / "sample")))
    (folder / "recipe.yaml").write_text("name: debug\noutput: outputs/debug\n")
    return folder


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_dry_run_finds_what_is_wrong(debug, capsys):
    run("runs/dry_run.py", debug)
    output = capsys.readouterr().out
    assert "Every stage can run" in output and re.search(r"\| sft .*0.1M parameters, rows of 128, 0.\d+ of", output)

    change(debug / "sft.yaml", "max_length: 128", "max_length: 100000")
    change(debug / "dpo.yaml", "outputs/debug/sft", "outputs/debug/nowhere")
    change(debug / "recipe.yaml", "name", "memory: 2.1GiB\nname")
    with pytest.raises(UserError) as error:
        run("runs/dry_run.py", debug)
    problems = str(error.value)
    assert "rows of 100000 tokens are longer" in problems and "sft.yaml" in problems
    assert "outputs/debug/nowhere" in problems
    assert not (ROOT / "outputs" / "debug" / "shards").exists() or "shards" not in problems

    change(debug / "sft.yaml", "max_steps", "max_step")
    with pytest.raises(UserError, match=r"sft.yaml: .*did you mean `max_steps`"):
        run("runs/dry_run.py", debug)
    (debug / "sft.yaml").rename(debug / "stf.yaml")
    with pytest.raises(UserError, match=r"did you mean sft.yaml"):
        run("runs/dry_run.py", debug)
