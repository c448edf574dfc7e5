"""Did the last `make quickstart` reach what the README promises? Skipped where it has not run."""

import json

import pytest
from conftest import ROOT

SUMMARY = ROOT / "outputs" / "quickstart" / "summary.json"
pytestmark = pytest.mark.skipif(not SUMMARY.exists(), reason="needs `make quickstart`")


def test_the_quickstart_reaches_its_promises():
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    answers = {name: score["acc"] for name, score in summary["qa_exact_match_by_checkpoint"].items()}
    assert summary["exam"]["chance"] == 0.25
    assert summary["exam"]["sft"]["acc"] >= 0.8 and summary["exam"]["sft"]["n"] >= 250
    assert answers["sft"] >= 0.7
    assert answers["dpo"] >= answers["sft"] - 0.02  # not lower, but for the noise of about 400 questions
    assert summary["dpo_pair_accuracy"] >= 0.9
    low, high = summary["exam_letter"]["sft"]["ci95"]
    assert low <= 0.4  # letters stay near chance: if they ever do not, the README must stop saying so
