"""A run is resumed only with the options that decide what it trains; others may change."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run, sft_arguments
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from buddygpt.cli.errors import UserError
from buddygpt.rlhf.pairs import CPOConfig, ORPOConfig
from buddygpt.training.origin import describe_settings, require_same_origin
from buddygpt.training.resume import Start

# Of each config: options that decide what is trained, and options that do not, each with another value.
FIXED = {
    SFTConfig: dict(packing=True, max_length=64, assistant_only_loss=True, completion_only_loss=True, loss_type="dft",
                    model_init_kwargs={"dtype": "bfloat16"}, seed=7, neftune_noise_alpha=5.0),
    DPOConfig: dict(beta=0.5, loss_type=["ipo"], max_length=64, label_smoothing=0.1, truncation_mode="keep_end",
                    sync_ref_model=True, f_divergence_type="forward_kl", loss_weights=[0.5]),
    KTOConfig: dict(beta=0.5, desirable_weight=2.0, loss_type="apo_zero_unpaired"),
    ORPOConfig: dict(beta=0.5, max_length=64),
    CPOConfig: dict(simpo_gamma=2.0, cpo_alpha=0.5),
    RewardConfig: dict(center_rewards_coefficient=0.1),
    GRPOConfig: dict(temperature=0.5, num_generations=4, loss_type="grpo", reward_weights=[1.0], beta=0.1),
}  # fmt: skip
FREE = {
    SFTConfig: dict(eval_packing=False, dataset_num_proc=2, activation_offloading=True,
                    model_init_kwargs={"attn_implementation": "eager"}),
    DPOConfig: dict(precompute_ref_log_probs=True),
    GRPOConfig: dict(log_completions=True, vllm_mode="server"),
}  # fmt: skip
SCHEDULE = dict(learning_rate=0.5, max_steps=9, num_train_epochs=5, warmup_steps=3, eval_steps=7, logging_steps=3)
ARGUMENTS = {"train_files": ["a.jsonl"], "loss_on": ["text", "calls"], "sample_prompts": [], "exams": []}


def settings(config: type[TrainingArguments], folder: Path, arguments: dict | None = None, **options) -> dict:
    args = config(str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, **options)
    return describe_settings(SimpleNamespace(args=args), arguments or ARGUMENTS)


@pytest.mark.parametrize("config", FIXED, ids=lambda config: config.__name__)
def test_what_is_trained_may_not_change_and_the_rest_may(config, tmp_path):
    before = settings(config, tmp_path)
    for key, value in (SCHEDULE | FREE.get(config, {})).items():
        assert settings(config, tmp_path, **{key: value}) == before, key
    for key, value in FIXED[config].items():
        now = settings(config, tmp_path, **{key: value})
        changed = {name for name in now if now[name] != before.get(name)}
        assert changed & {key, {"seed": "data_seed", "model_init_kwargs": "dtype"}.get(key)}, key
    for name, value in {"loss_on": ["text"], "train_on_unfit_data": True, "method": "offline"}.items():
        assert settings(config, tmp_path, ARGUMENTS | {name: value}) != before, name


def test_moved_files_and_runs_of_earlier_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/exam", "b/exam", "b/other"):
        os.makedirs(name)
    exams = [settings(SFTConfig, tmp_path, ARGUMENTS | {"exams": [name]}) for name in ("a/exam", "b/exam", "b/other")]
    assert exams[0] == exams[1] != exams[2]
    start = Start(str(tmp_path / "checkpoint-1"), 1, {"origin": {"optim": "adamw"}})
    require_same_origin(start, {"optim": "adamw", "settings": exams[0], "eval_data_sha256": []})


RESUMED = {
    "loss_on": (["--loss_on", "text"], r"its loss_on was \['thoughts', 'calls', 'text'\], this run's is \['text'\]"),
    "max_length": (["--max_length", 64], "its max_length was 128, this run's is 64. Set another output_dir"),
    "eval_files": (["--eval_files", "TRAIN"], "its eval_data_sha256 was"),
    "tokens": (["--chat_template_path", "TEMPLATE"], "its tokenizer_sha256 was"),
}


@pytest.mark.slow
def test_the_line_names_key_and_values(workspace, base, chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "run")
    template = tmp_path / "other.jinja"
    template.write_text((chat_model / "chat_template.jinja").read_text() + "{# other #}")
    names = {"TRAIN": workspace / "sample" / "sft_train.jsonl", "TEMPLATE": template}
    command = [*sft_arguments(workspace, base), "--output_dir", tmp_path / "run"]
    for words, message in RESUMED.values():
        with pytest.raises(UserError, match=f"cannot resume the run in .*: {message}"):
            run("sft/sft.py", *command, *(names.get(word, word) for word in words))
    run("sft/sft.py", *command, "--learning_rate", 0.001, "--max_steps", 7, "--eval_strategy", "no")
