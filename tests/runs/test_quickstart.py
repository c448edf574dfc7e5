"""Check the results of the last `make quickstart` against what the README promises. Skipped without such a run."""

import json

import pytest
from conftest import ROOT

DENSE, MIXTURE = (ROOT / "outputs" / name for name in ("quickstart", "quickstart-mla-moe"))


def read_summary(run):
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not (DENSE / "summary.json").exists(), reason="needs `make quickstart`")
def test_quickstart_scores_reach_what_the_readme_promises():
    summary = read_summary(DENSE)
    answers = {name: score["acc"] for name, score in summary["qa_exact_match_by_checkpoint"].items()}
    assert summary["exam"]["chance"] == 0.25
    assert summary["exam"]["sft"]["acc"] >= 0.8 and summary["exam"]["sft"]["n"] >= 250
    assert answers["sft"] >= 0.7
    assert answers["dpo"] >= answers["sft"] - 0.02  # not lower, within the noise of about 400 questions
    assert summary["dpo_pair_accuracy"] >= 0.9
    low, high = summary["exam_letter"]["sft"]["ci95"]
    assert low <= 0.4  # the README says that letters stay near chance


@pytest.mark.skipif(
    not all((run / "summary.json").exists() for run in (DENSE, MIXTURE)),
    reason="needs `make quickstart` and `make quickstart MODEL=quickstart-mla-moe`",
)
def test_latent_attention_with_experts_learns_as_well_as_the_dense_model():
    dense, mixture = read_summary(DENSE), read_summary(MIXTURE)
    for name in ("base", "sft", "dpo"):
        assert mixture["exam"][name]["acc"] >= dense["exam"][name]["acc"] - 0.05
    card = json.loads((MIXTURE / "pretrain" / "run.json").read_text(encoding="utf-8"))
    assert card["metrics"]["router/load_max"] < 1.3 and card["metrics"]["router/load_min"] > 0.7
    assert card["metrics"]["router/dropped"] == 0
