"""Tests of the check that a checkpoint has all weights of its model, and that each is a number."""

import json
import os

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from buddygpt.cli.errors import UserError
from buddygpt.cli.weights import require_all_weights, require_finite_weights


@pytest.fixture
def checkpoint(tmp_path):
    tiny_models.make_model(num_key_value_heads=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("variant", ["gqa", "mla-moe"])
def test_a_whole_checkpoint_passes(variant, tmp_path):
    model = tiny_models.make_model(**tiny_models.VARIANTS[variant])
    model.save_pretrained(tmp_path)
    require_all_weights(str(tmp_path))
    require_finite_weights(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 4}, "lacks model.layers.3.* more tensors"),
        ({"num_hidden_layers": 2}, "has a layer too many for its config.json: model.layers.2"),
        ({"intermediate_size": 16}, "has another shape of model.layers.0.mlp"),
        ({"vocab_size": 20}, "has another shape of model.embed_tokens.weight"),
    ],
)
def test_weights_of_another_config_are_refused(change, match, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=match):
        require_all_weights(str(checkpoint))


def test_missing_tensors_and_damaged_files_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks model.layers.1.mlp.up_proj.weight; copy"):
        require_all_weights(str(checkpoint))
    for size in (5000, 0):
        os.truncate(path, size)
        with pytest.raises(UserError, match="cannot read the weights"):
            require_all_weights(str(checkpoint))
    path.unlink()
    with pytest.raises(UserError, match="cannot read the weights"):
        require_all_weights(str(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_weight_that_is_no_number_is_refused(value):
    model = tiny_models.make_model(num_key_value_heads=2).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match="model has NaN or infinite weights in model.layers.1.mlp.up_proj.weight"):
        require_finite_weights(model, "model")


def test_a_pickle_that_would_run_code_is_told_in_one_line(checkpoint):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(checkpoint / "ran"),)

    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Call()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="may run code. Use safetensors$") as raised:
        require_all_weights(str(checkpoint))
    assert "\n" not in str(raised.value) and not (checkpoint / "ran").exists()
