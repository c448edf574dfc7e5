"""A decay that starts from a stable checkpoint equals the end of an uninterrupted run, also as a stage of its own."""

import shutil

import pytest
import torch
from conftest import history, pretrain_arguments, run
from safetensors.torch import load_file
from tiny_shards import Shard, write_shards
from transformers import AutoTokenizer, TrainingArguments

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import tokenizer_fingerprint
from buddygpt.pretrain.annealing import count_decay_steps

SCHEDULE = ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", 2, "--optimizer", "muon"]
SCHEDULE += ["--logging_steps", 1, "--save_steps", 4, "--eval_strategy", "no", "--save_total_limit", 9]


def decay(steps: float) -> list[str]:
    return ["--lr_scheduler_kwargs", f'{{"num_decay_steps": {steps}, "decay_type": "linear"}}']


def assert_same_weights(one, other):
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.fixture(scope="module")
def one_block(workspace, tmp_path_factory):
    """Shards of one block, so that every run reads the same rows at every step."""
    fingerprint = tokenizer_fingerprint(AutoTokenizer.from_pretrained(workspace / "tokenizer"))
    return write_shards(tmp_path_factory.mktemp("data") / "train", [Shard("a.ds", "a", [64])], fingerprint)


@pytest.mark.slow
def test_the_schedule_ends_early_from_any_stable_checkpoint(workspace, tmp_path):
    words = [*pretrain_arguments(workspace), *SCHEDULE]
    run("pretrain/pretrain.py", *words, *decay(4), "--max_steps", 12, "--output_dir", tmp_path / "whole")
    run("pretrain/pretrain.py", *words, *decay(0.2), "--max_steps", 20, "--output_dir", tmp_path / "longer")
    stable = ["--resume_from_checkpoint", tmp_path / "longer/checkpoint-8"]
    run("pretrain/pretrain.py", *words, *decay(1 / 3), "--max_steps", 12, *stable, "--output_dir", tmp_path / "decay")
    rates = [row["learning_rate"] for row in history(tmp_path / "longer") if "loss" in row]
    assert rates[2:17] == [4e-3] * 15 and rates[19] == pytest.approx(1e-3)
    assert_same_weights(tmp_path / "whole", tmp_path / "decay")


@pytest.mark.slow
def test_a_decay_on_other_data_keeps_the_optimizer(workspace, one_block, tmp_path):
    words = [*pretrain_arguments(workspace), *SCHEDULE, "--train_data", one_block]
    run("pretrain/pretrain.py", *words, *decay(4), "--max_steps", 12, "--output_dir", tmp_path / "whole")
    words += ["--lr_scheduler_type", "linear", "--warmup_steps", 0, "--max_steps", 4, "--model_config", "null"]
    words += ["--model_name_or_path", tmp_path / "whole/checkpoint-8"]
    run("pretrain/pretrain.py", *words, "--keep_optimizer", "true", "--output_dir", tmp_path / "decay")
    assert_same_weights(tmp_path / "whole", tmp_path / "decay")
    with pytest.raises(UserError, match="of another optimizer; set the one of that run"):
        adamw = ["--optimizer", "null", "--keep_optimizer", "true"]
        run("pretrain/pretrain.py", *words, *adamw, "--output_dir", tmp_path / "a")

    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "weights")
    (tmp_path / "weights/optimizer.pt").unlink()
    words += ["--keep_optimizer", "true", "--output_dir", tmp_path / "b"]
    with pytest.raises(UserError, match="has no optimizer.pt. Name one of the checkpoint-N folders"):
        run("pretrain/pretrain.py", *words, "--model_name_or_path", tmp_path / "weights")
    with pytest.raises(UserError, match="name a checkpoint of another run there"):
        run("pretrain/pretrain.py", *words, "--model_name_or_path", "null", "--model_config", "debug")


@pytest.mark.parametrize(("given", "steps"), [(0.2, 20), (0.555, 56), (7, 7), (None, None)])
def test_a_share_of_the_steps(given, steps, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=100, use_cpu=True)
    args.lr_scheduler_kwargs = given and {"num_decay_steps": given}
    count_decay_steps(args)
    assert (args.lr_scheduler_kwargs or {}).get("num_decay_steps") == steps
