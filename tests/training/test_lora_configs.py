"""The LoRA configs name layers that their models have, and train what their comments say."""

from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from transformers import Qwen3Config
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.model.presets import load_config
from buddygpt.training.adapters import prepare_lora
from buddygpt.training.tuning import TuningArguments

CONFIGS = [path for folder in ("sft", "rlhf") for path in sorted((ROOT / folder / "configs").glob("*.yaml"))]
LORA = [path for path in CONFIGS if "use_peft: true" in path.read_text(encoding="utf-8")]
QWEN3 = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)


def architecture(stem: str):
    """Return the config of a model: a preset, or Qwen3-0.6B."""
    return (
        Qwen3Config(**QWEN3, num_hidden_layers=2) if stem == "qwen3-0.6b" else load_config(stem, num_hidden_layers=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", LORA, ids=[f"{path.parts[-3]}-{path.stem}" for path in LORA])
@pytest.mark.parametrize("added_tokens", [False, True])
def test_a_lora_config_fits_its_model(path, added_tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["recipe", "--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    )
    recipe = {"sft": SFTConfig, "rlhf": DPOConfig}[path.parts[-3]]
    _, training_args, model_args = parse_arguments(TuningArguments, recipe, ModelConfig)
    config = architecture(path.stem.rsplit("-", 1)[0])
    if added_tokens:  # as the comment in the configs says
        model_args.lora_modules_to_save = ["embed_tokens", "lm_head"]
    prepare_lora(model_args, config, SimpleNamespace(deepspeed_plugin=None, trust_remote_code=False))
    assert bool(getattr(config, "n_routed_experts", None)) == bool(model_args.lora_target_parameters)
    assert model_args.load_in_4bit == path.stem.endswith("-qlora")
    assert training_args.learning_rate > 0
    output_dir = yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"]
    assert output_dir.endswith(path.stem.rsplit("-", 1)[1])


def test_every_size_has_a_config_for_sft_and_dpo():
    stems = {(path.parts[-3], path.stem) for path in LORA}
    models = ("quickstart-lora", "buddygpt-0.1b-lora", "buddygpt-0.7b-mla-moe-lora", "qwen3-0.6b-lora")
    assert {(folder, stem) for folder in ("sft", "rlhf") for stem in (*models, "qwen3-0.6b-qlora")} <= stems
