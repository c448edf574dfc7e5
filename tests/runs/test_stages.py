"""The stages of a whole chain: completed ones are skipped, and stopped ones are counted and repeated."""

import subprocess

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
    (tmp_path / "first-ran").unlink()
    (tmp_path / "allowed").touch()

    resumed = run_chain(tmp_path)
    assert resumed.returncode == 0 and (tmp_path / "third-ran").exists()
    assert not (tmp_path / "first-ran").exists() and "first: completed earlier" in resumed.stdout
    attempts = [line.split("\t") for line in (tmp_path / "seconds.tsv").read_text().splitlines()]
    assert [(name, state) for name, _, state in attempts] == [
        ("first", "done"),
        ("second", "stopped"),
        ("second", "done"),
        ("third", "done"),
    ]


def test_openmp_threads_spin_briefly(tmp_path):
    script = 'OUT=$1; . runs/stages.sh; echo "$GOMP_SPINCOUNT"'
    command = ["bash", "-c", script, "chain", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1000\n"
