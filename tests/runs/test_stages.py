"""The stages of a whole chain: completed ones are skipped, and stopped ones are counted and repeated."""

import subprocess

import pytest
from conftest import ROOT

CHAIN = """
set -euo pipefail
OUT=$1
. runs/stages.sh
stage first touch "$OUT/first-ran"
stage second test -e "$OUT/allowed"
stage third touch "$OUT/third-ran"
"""


def run_chain(folder):
    command = ["bash", "-c", CHAIN, "chain", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_chain_resumes_at_the_stage_that_stopped(tmp_path):
    stopped = run_chain(tmp_path)
    assert stopped.returncode == 1 and not (tmp_path / "third-ran").exists()
    assert "stopped in second: the same command continues there" in stopped.stderr
    (tmp_path / "first-ran").unlink()
    (tmp_path / "allowed").touch()

    resumed = run_chain(tmp_path)
    assert resumed.returncode == 0 and (tmp_path / "third-ran").exists()
    assert not (tmp_path / "first-ran").exists() and "first: completed earlier" in resumed.stdout
    attempts = [line.split("\t") for line in (tmp_path / "seconds.tsv").read_text().splitlines()]
    assert all(cpu.isdigit() for *_, cpu in attempts) and not list(tmp_path.glob("times*"))
    assert [(name, state) for name, _, state, _ in attempts] == [
        ("first", "done"),
        ("second", "stopped"),
        ("second", "done"),
        ("third", "done"),
    ]


@pytest.mark.slow
def test_cpu_seconds_of_all_processes_are_recorded(tmp_path):
    """A stage that computes for about a second in the child of a child, and one that waits."""
    compute = "python3 -c 'import time\nwhile time.process_time() < 1.2: pass'"
    chain = f'set -euo pipefail; OUT=$1; . runs/stages.sh; stage works bash -c "{compute}; :"; stage waits sleep 1'
    subprocess.run(["bash", "-c", chain, "chain", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    works, waits = (line.split("\t") for line in (tmp_path / "seconds.tsv").read_text().splitlines())
    assert int(works[3]) >= 1 and waits[2:] == ["done", "0"]


def test_openmp_threads_spin_briefly(tmp_path):
    script = 'OUT=$1; . runs/stages.sh; echo "$GOMP_SPINCOUNT"'
    command = ["bash", "-c", script, "chain", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1000\n"
