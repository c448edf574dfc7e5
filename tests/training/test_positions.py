"""Longer contexts: what `model_init_kwargs` becomes, and that training, export and GGUF keep it."""

import json

import pytest
import torch
from conftest import pretrain_arguments, run, sft_arguments
from tiny_models import GQA, MLA, SIZES
from transformers import AutoModelForCausalLM, LlamaConfig

from buddygpt.cli.errors import UserError
from buddygpt.model import BuddyGPTConfig
from buddygpt.training.positions import extend_positions

# The tiny models have 64 positions and theta 100,000.
THETA = {"rope_theta": 100000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}


def config_of(kind: str = "gqa", **fields):
    if kind == "llama":
        return LlamaConfig(**SIZES | fields)
    return BuddyGPTConfig(**SIZES | {"gqa": GQA, "mla": MLA}[kind] | fields)


@pytest.mark.parametrize("kind", ["gqa", "mla", "llama"])
def test_theta_factor_and_length_come_from_the_checkpoint(kind):
    config = config_of(kind)
    for change in (
        {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"max_position_embeddings": 256, "rope_parameters": YARN},
    ):
        assert extend_positions(config, change) == {"max_position_embeddings": 256, "rope_parameters": YARN}
    change = {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "linear"}, "dtype": "auto"}
    assert extend_positions(config, change) == change | {"rope_parameters": LINEAR}
    change = {"max_position_embeddings": 256, "rope_parameters": {"rope_theta": 1e6}}
    expected = {"rope_type": "default", "rope_theta": 1e6}
    assert extend_positions(config, change) == change | {"rope_parameters": expected}
    assert extend_positions(config, {"use_cache": False}) == {"use_cache": False}


def test_a_model_may_have_been_trained_on_fewer_positions_than_it_has():
    change = {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}}
    expected = YARN | {"original_max_position_embeddings": 16}
    assert extend_positions(config_of(), change) == {"max_position_embeddings": 64, "rope_parameters": expected}
    change = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    assert extend_positions(config_of(), change) == change | {"rope_parameters": LINEAR}


@pytest.mark.parametrize("rope", [YARN, LINEAR])
def test_a_second_extension_counts_from_the_trained_length(rope):
    config = config_of(max_position_embeddings=256, rope_parameters=dict(rope))
    change = {"max_position_embeddings": 1024, "rope_parameters": {"rope_type": rope["rope_type"]}}
    assert extend_positions(config, change)["rope_parameters"] == rope | {"factor": 16.0}


def test_new_positions_without_new_angles_are_warned_of(capsys):
    assert extend_positions(config_of(), {"max_position_embeddings": 128}) == {"max_position_embeddings": 128}
    assert "positions 64 to 127 are new to the model" in capsys.readouterr().err


REFUSED = {
    "unknown key": ({"rope_parameters": {"rope_type": "yarn", "facto": 4}}, "unknown key facto; did you mean factor"),
    "unknown type": ({"rope_parameters": {"rope_type": "yarm"}}, "rope_type is yarm; use one of default, linear"),
    "no mapping": ({"rope_parameters": "yarn"}, "rope_parameters is yarn; write a mapping"),
    "small factor": (
        {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn", "factor": 2}},
        "factor 2 stretches the 64 trained positions to 128, but max_position_embeddings is 256",
    ),
    "no length": ({"rope_parameters": {"rope_type": "yarn"}}, "stretches the 64 trained positions to 64"),
    "factor is text": ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor of rope_parameters is 4"),
    "length is text": ({"max_position_embeddings": "256"}, "max_position_embeddings is 256; give a number"),
    "dynamic": (
        {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "dynamic", "factor": 4}},
        "rope_type: dynamic .* train with rope_type: yarn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stretched_is_refused(case):
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        extend_positions(config_of(), change)


@pytest.mark.slow
def test_a_longer_stage_keeps_its_positions_to_the_export(workspace, base, tmp_path, capsys):
    """Pretraining and SFT on 256 tokens from 128, then the native export and GGUF."""
    change = json.dumps({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn"}})
    longer = ["--model_name_or_path", base, "--model_config", "null", "--block_size", 256, "--eval_data", "null"]
    longer += ["--eval_strategy", "no", "--max_steps", 2, "--per_device_train_batch_size", 1]
    with pytest.raises(UserError, match="block_size is 256, but the model has only 128 positions .*rope_type: yarn"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), *longer, "--output_dir", tmp_path / "a")
    longer += ["--model_init_kwargs", change]
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), *longer, "--output_dir", tmp_path / "a")
    expected = YARN | {"factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    saved = json.loads((tmp_path / "a/config.json").read_text())
    assert (saved["max_position_embeddings"], saved["rope_parameters"]) == (256, expected)
    with pytest.raises(UserError, match="its model_init_kwargs was"):
        other = ["--model_init_kwargs", '{"max_position_embeddings": 256}', "--max_steps", 4]
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), *longer, *other, "--output_dir", tmp_path / "a")

    tune = [*sft_arguments(workspace, base), "--max_length", 256, "--model_init_kwargs", change, "--max_steps", 1]
    run("sft/sft.py", *tune, "--output_dir", tmp_path / "b")
    saved = json.loads((tmp_path / "b/config.json").read_text())
    assert (saved["max_position_embeddings"], saved["rope_parameters"]) == (256, expected)

    run("export/to_native.py", "--checkpoint", tmp_path / "a", "--output", tmp_path / "native")
    ids = torch.arange(256)[None] % 500
    ours, native = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "native"))
    assert native.config.model_type == "qwen3"
    with torch.no_grad():
        assert torch.equal(ours(ids).logits[:, 128:], native(ids).logits[:, 128:])


def test_model_init_kwargs_change_checkpoints_only(workspace, tmp_path):
    change = ["--model_init_kwargs", '{"max_position_embeddings": 256}', "--output_dir", tmp_path / "a"]
    with pytest.raises(UserError, match="edit the JSON of model_config"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), *change)
    with pytest.raises(UserError, match="`model_init_kwargs` is 5; write a mapping"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), *change, "--model_init_kwargs", "5")
