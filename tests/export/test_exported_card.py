"""The model card of a native export, after an evaluation of the checkpoint."""

import json
import shutil

import pytest
from conftest import run
from huggingface_hub import ModelCard


@pytest.mark.slow
def test_scores_and_cards_follow_a_model_to_its_export(workspace, base, tmp_path):
    checkpoint = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoint-*"))
    sample = ["--sample_dir", workspace / "sample", "--tasks", "sample_exam_text", "--limit", 8, "--device", "cpu"]
    run("eval/run_eval.py", "--checkpoints", f"base={checkpoint}", *sample, "--output", tmp_path / "eval")
    run("eval/report.py", "--results", tmp_path / "eval", "--output", tmp_path / "eval/report.md")
    run("export/to_native.py", "--checkpoint", checkpoint, "--output", tmp_path / "native")

    score = json.loads((tmp_path / "eval/scores.json").read_text())["base"]["sample_exam_text"]["acc"]
    for folder in (checkpoint, tmp_path / "native"):
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
        result = next(each for each in card.data.eval_results if each.metric_type == "acc")
        assert (result.dataset_name, result.metric_value) == ("sample_exam_text", score["value"])
        assert f"{base.parent}/" not in card.content + (folder / "run.json").read_text()
    assert "trust_remote_code" not in card.text.split("## 中文")[0] and "vllm serve" in card.text
