"""Every executor gives the same shards: processes on this machine, Slurm and Ray."""

import re
from pathlib import Path

import dill
import pytest
from test_pipeline import content, make_config, prepare
from test_prepare_pretrain import byte_tokenizer

from buddygpt.cli.errors import UserError

SLURM = {"partition": "cpu", "time": "4:00:00", "qos": None}


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, byte_tokenizer(tmp_path / "tokenizer"))


def run_on_slurm(scripts: list[Path], monkeypatch) -> None:
    """Run each job of each array, as the cluster would."""
    for script in scripts:
        text = script.read_text()
        last = int(re.search(r"--array=0-(\d+)", text)[1])
        for index in range(last + 1):
            with monkeypatch.context() as job:
                job.setenv("SLURM_ARRAY_TASK_ID", str(index))
                job.setenv("SLURM_NODELIST", "here")
                with open(re.search(r"launch_pickled_pipeline (\S+)", text)[1], "rb") as file:
                    dill.load(file).run()


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_slurm_gets_chained_jobs_that_give_the_same_bytes(config, monkeypatch, tmp_path, capsys):
    whole = content(prepare(config("whole"), monkeypatch))
    path = config("out", executor="slurm", workers=2, slurm=SLURM)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(UserError, match="there is no `sbatch` here: run the same command on a machine of the cluster"):
        prepare(path, monkeypatch)
    scripts = [Path(script) for script in re.findall(r"job script: (\S+\.slurm), \d+ tasks", capsys.readouterr().out)]
    assert [script.parent.name for script in scripts][:2] == ["clean", "check"]
    assert [script.parent.name for script in scripts][-2:] == ["manifest", "publish"]
    for line in ("partition=cpu", "kill-on-invalid-dep=yes"):
        assert all(f"#SBATCH --{line}\n" in script.read_text() for script in scripts)
    write_command(tmp_path / "bin" / "scontrol", "echo here")
    write_command(tmp_path / "bin" / "sbatch", "exit 1")
    with pytest.raises(UserError, match=r"sbatch refused .*clean/launch_script\.slurm; fix `slurm`"):
        prepare(path, monkeypatch)
    calls = tmp_path / "calls"
    write_command(tmp_path / "bin" / "sbatch", f'echo "$@" >> {calls}; echo Submitted batch job $(wc -l < {calls})')
    prepare(path, monkeypatch)
    for number, call in enumerate(calls.read_text().splitlines()):
        assert (f"--dependency=afterok:{number}" in call) == (number > 0)
    assert number + 1 == len(scripts)
    capsys.readouterr()
    write_command(tmp_path / "bin" / "squeue", "echo 7; echo 2")
    prepare(path, monkeypatch)  # nothing is submitted twice
    assert "still queued or running: squeue --jobs=2,7; run" in capsys.readouterr().out
    assert len(calls.read_text().splitlines()) == len(scripts)
    with pytest.raises(UserError, match="tasks of stage clean have failed; run the same"):
        run_on_slurm(scripts[1:], monkeypatch)
    run_on_slurm(scripts, monkeypatch)
    assert content(tmp_path / "out") == whole
    prepare(path, monkeypatch)
    assert "already made" in capsys.readouterr().out and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_failed_jobs_on_slurm_are_reported_and_submitted_again(config, monkeypatch, tmp_path, capsys):
    path = config("out", executor="slurm", workers=2, slurm=SLURM)
    row = (tmp_path / "1.jsonl").read_text()
    (tmp_path / "1.jsonl").write_text("3\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    for command, text in {
        "scontrol": "echo here",
        "squeue": "echo 99",
        "sbatch": "echo Submitted batch job 5",
    }.items():
        write_command(tmp_path / "bin" / command, text)
    prepare(path, monkeypatch)
    scripts = [Path(script) for script in re.findall(r"job 5: (\S+\.slurm), \d+ tasks", capsys.readouterr().out)]
    with pytest.raises(UserError, match=r"1\.jsonl:1: the row is not an object"):
        run_on_slurm(scripts[:1], monkeypatch)
    prepare(path, monkeypatch)
    assert f"clean failed: {tmp_path / '1.jsonl'}:1: the row is not an object" in capsys.readouterr().out
    write_command(tmp_path / "bin" / "squeue", "exit 1")
    with pytest.raises(UserError, match=r"cannot ask `squeue` whether the jobs in \S+/jobs are still running"):
        prepare(path, monkeypatch)
    (tmp_path / "1.jsonl").write_text(row)
    prepare(path, monkeypatch)  # other input, so the work starts from scratch


@pytest.mark.parametrize(
    "slurm, message",
    [
        (None, "`slurm` needs at least a partition and a time in quotes"),
        ({"partition": "cpu", "time": 14400}, "a time in quotes"),
        ({"partition": "cpu", "time": "4:00:00", "memory": 3}, "`slurm`: .*memory"),
    ],
)
def test_mistakes_in_the_slurm_settings_are_reported(slurm, message, config, monkeypatch):
    with pytest.raises(UserError, match=message):
        prepare(config("out", executor="slurm", slurm=slurm), monkeypatch)


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_reported(config, monkeypatch):
    ray = pytest.importorskip("ray")

    def fail(**options: object) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setenv("RAY_ADDRESS", "far:1")
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match="RAY_ADDRESS is far:1, and no cluster answers there: Failed to connect"):
        prepare(config("out", executor="ray"), monkeypatch)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(config, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")
    whole = content(prepare(config("whole"), monkeypatch))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        assert content(prepare(config("out", executor="ray", workers=2), monkeypatch)) == whole
        (tmp_path / "1.jsonl").write_text("3\n")
        with pytest.raises(UserError, match=r"1\.jsonl:1: the row is not an object but int"):
            prepare(config("bad", executor="ray", workers=2), monkeypatch)
    finally:
        ray.shutdown()
