"""The average of checkpoints equals a hand-made one and loads; what cannot be averaged is refused in one line."""

import merge_checkpoints
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import GQA, make_model
from tiny_tokenizer import run
from transformers import AutoModelForCausalLM

from buddygpt.cli.errors import UserError


@pytest.fixture
def checkpoints(tmp_path):
    for seed in range(3):
        make_model(seed, **GQA).to(torch.bfloat16).save_pretrained(
            tmp_path / f"checkpoint-{seed}", max_shard_size="20KB"
        )
        (tmp_path / f"checkpoint-{seed}" / "optimizer.pt").write_bytes(b"state")
    return [tmp_path / f"checkpoint-{seed}" for seed in range(3)]


def test_weights_are_the_mean_and_the_folder_is_a_checkpoint(checkpoints, tmp_path, monkeypatch):
    run(merge_checkpoints, monkeypatch, "--checkpoints", *checkpoints, "--output", tmp_path / "mean")
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in checkpoints]
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean", dtype="auto").state_dict()
    for name, weight in mean.items():
        expected = torch.stack([model[name].double() for model in models]).mean(0)
        assert torch.equal(weight, expected.to(weight.dtype)) and weight.dtype == models[0][name].dtype
    names = {path.name for path in (tmp_path / "mean").iterdir()}
    assert "config.json" in names and not names & {"optimizer.pt", "trainer_state.json"}
    assert sum(len(load_file(path)) for path in (tmp_path / "mean").glob("*.safetensors")) > 10


def test_what_cannot_be_averaged_is_refused(checkpoints, tmp_path, monkeypatch):
    make_model(0, **GQA, num_hidden_layers=2).save_pretrained(tmp_path / "smaller")
    cases = {
        "two or more": [checkpoints[0]],
        "not the same model": [checkpoints[0], tmp_path / "smaller"],
        "no such checkpoint folder": [checkpoints[0], tmp_path / "missing"],
    }
    for message, folders in cases.items():
        with pytest.raises(UserError, match=message):
            run(merge_checkpoints, monkeypatch, "--checkpoints", *folders, "--output", tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
    (tmp_path / "mean").mkdir()
    with pytest.raises(UserError, match="exists"):
        run(merge_checkpoints, monkeypatch, "--checkpoints", *checkpoints, "--output", tmp_path / "mean")
