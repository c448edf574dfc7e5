"""DPO, KTO, ORPO, SimPO and reward models: losses, LoRA, evaluation, and what is refused.

test_every_recipe.py compares what they compute with losses computed by hand, on every kind of model.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import history, run
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import GQA, MLA, MOE, SIGMOID, make_model, same_weights
from tiny_tokenizer import TEXTS, train_tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DPOTrainer, KTOTrainer

from buddygpt.cli.errors import UserError
from buddygpt.rlhf.dpo import CHOICES

MIXTURE = MLA | MOE | SIGMOID | dict(scoring_func="sigmoid", aux_loss_alpha=0.05, z_loss_coef=0.01)
RECIPES = {"dpo": "pairs", "kto": "labels", "orpo": "pairs", "simpo": "pairs", "reward": "pairs"}
LOSSES = {
    "kto": ["kto", "apo_zero_unpaired"],
    "simpo": ["simpo", "sigmoid", "hinge", "ipo", "alphapo"],
}
COMMON = dict(
    max_length=64,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    max_steps=4,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=2,
    use_cpu=True,
    bf16=False,
    activation_checkpointing=False,
    report_to="none",
)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, models of three kinds with random weights, pairs and labeled answers."""
    folder = tmp_path_factory.mktemp("preferences")
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(folder))
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    models = {"dense": make_model(**GQA, **sizes), "mixture": make_model(**MIXTURE, **sizes)}
    stock = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=12)
    models["qwen3"] = Qwen3ForCausalLM(
        Qwen3Config(**sizes, **stock, num_key_value_heads=2, max_position_embeddings=64)
    )
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = random.Random(0)
    pairs = []
    for number in range(14):
        question, answer = (words.choice([TEXTS[0], TEXTS[1], TEXTS[3]]) for _ in range(2))
        answer = answer[number : number + 9].strip()
        pairs.append((question[:12].strip(), answer, f"{answer[::-1]}!"))
    write(folder / "pairs.jsonl", map(pair, pairs[:10]))
    write(folder / "more_pairs.jsonl", map(pair, pairs[10:]))
    write(folder / "labels.jsonl", (labeled(each, label) for each in pairs for label in (True, False)))
    write(folder / "good.jsonl", (labeled(each, True) for each in pairs))
    return folder


def pair(texts: tuple[str, str, str]) -> dict[str, Any]:
    question, good, bad = texts
    return {
        "prompt": [turn("user", question)],
        "chosen": [turn("assistant", good)],
        "rejected": [turn("assistant", bad)],
    }


def labeled(texts: tuple[str, str, str], label: bool) -> dict[str, Any]:
    answer = texts[1] if label else texts[2]
    return {"prompt": [turn("user", texts[0])], "completion": [turn("assistant", answer)], "label": label}


def write(file: Path, rows: Iterator[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train(recipe: str, folder: Path, output: Path, model: str = "dense", **options: Any) -> dict[str, Any]:
    """Run a recipe on a YAML file, and return its last metrics."""
    file = folder / f"{RECIPES[recipe]}.jsonl"
    config = COMMON | {"train_files": [str(file)], "model_name_or_path": str(folder / model)}
    config |= {"output_dir": str(output)} | options
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run(f"rlhf/{recipe}.py", "--config", path)
    return json.loads((output / "run.json").read_text())["metrics"]


# --- losses ---


def same_weights_as_start(start: Path, trained: Path) -> bool:
    before, after = (load_file(path / "model.safetensors") for path in (start, trained))
    return all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kto", "orpo", "reward"])
def test_experts_are_balanced_and_z_loss_is_applied(recipe, folder, tmp_path):
    """Other coefficients give other weights, and the same reported loss."""
    losses, weights = [], []
    changes = [{}, {"aux_loss_alpha": 0.0}] + ([{"z_loss_coef": 0.0}] if recipe != "reward" else [])
    for number, change in enumerate(changes):
        output = tmp_path / str(number)
        metrics = train(recipe, folder, output, "mixture", max_steps=1, optim="sgd", model_init_kwargs=change)
        losses.append(metrics["loss"])
        weights.append(torch.cat([each.flatten() for each in load_file(output / "model.safetensors").values()]))
    for loss, other in zip(losses[1:], weights[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6) and not torch.equal(other, weights[0])


@pytest.mark.slow
def test_every_loss_of_dpo_from_yaml(folder, tmp_path):
    losses = {}
    for loss in CHOICES["loss_type"]:  # all 15 of TRL 1.16
        smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
        metrics = train(
            "dpo", folder, tmp_path / loss, loss_type=[loss], label_smoothing=smoothing, max_steps=2, save_steps=100
        )
        losses[loss] = metrics["loss"]
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0, loss
    assert len(set(losses.values())) > 10
    metrics = train(
        "dpo", folder, tmp_path / "both", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], max_steps=2
    )
    assert metrics["loss"] == pytest.approx(losses["sigmoid"] + 0.5 * losses["sft"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LOSSES)
def test_every_loss_of_the_others_from_yaml(recipe, folder, tmp_path):
    for loss in LOSSES[recipe]:
        metrics = train(recipe, folder, tmp_path / loss, loss_type=loss, beta=0.1, max_steps=1, save_steps=100)
        assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]), loss


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kto", "orpo"])
def test_lora_trains_and_is_merged(recipe, folder, tmp_path):
    train(recipe, folder, tmp_path / "run", use_peft=True, lora_r=4, max_steps=2)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not same_weights_as_start(folder / "dense", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "mixture"])
def test_lora_trains_the_score_of_a_reward_model_whole(model, folder, tmp_path, capsys):
    """The merged model scores as base and adapter do; a run that resumes has its bits."""
    train("reward", folder, tmp_path / "run", model, use_peft=True, lora_r=4)
    assert ", down_proj, score." in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(folder / model, num_labels=1)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    ids = torch.arange(4, 28).view(2, 12)
    assert merged.config.num_labels == 1 and merged(ids).logits.shape == (2, 1)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train("reward", folder, tmp_path / "resumed", model, use_peft=True, lora_r=4)
    assert same_weights(tmp_path / "resumed", tmp_path / "run")


# --- evaluation ---


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kto", "orpo", "simpo", "reward"])
def test_evaluation_does_not_depend_on_the_batch_size(recipe, folder, tmp_path):
    rows = [str(folder / f"{RECIPES[recipe]}.jsonl")]
    options = dict(eval_files=rows, eval_strategy="steps", eval_steps=1, max_steps=1)
    if recipe == "kto":
        options["loss_type"] = "apo_zero_unpaired"  # the other estimates the KL divergence of each batch
    results = []
    for size in (1, 3, 16):
        metrics = train(recipe, folder, tmp_path / str(size), per_device_eval_batch_size=size, **options)
        ignored = ("runtime", "per_second", "time", "logits/chosen", "logits/rejected", "min_reward", "max_reward")
        results.append({key: metrics[key] for key in metrics if key[:5] == "eval_" and not key.endswith(ignored)})
    assert len(results[0]) > 3
    assert results[0] == pytest.approx(results[2], rel=1e-4, abs=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_reward_model_reports_its_accuracy_by_source(folder, tmp_path):
    files = [str(folder / name) for name in ("pairs.jsonl", "more_pairs.jsonl")]
    options = dict(eval_files=files, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=3)
    metrics = train("reward", folder, tmp_path / "run", **options)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    for name in files:
        right = []
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            row, scores = json.loads(line), []
            for key in ("chosen", "rejected"):
                text = tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False).rstrip()
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                assert ids[0, -1] == tokenizer.eos_token_id
                scores.append(model(ids).logits.item())
            right.append(scores[0] > scores[1])
        assert metrics[f"eval_accuracy/{Path(name).stem}"] == pytest.approx(sum(right) / len(right))
    assert {"loss_curve.png", "modeling_buddygpt.py", "README.md"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert "text-classification" in (tmp_path / "run" / "README.md").read_text()


# --- reference log-probabilities ---


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "trainer"), [("dpo", DPOTrainer), ("kto", KTOTrainer)])
def test_reference_log_probabilities_are_computed_once(recipe, trainer, folder, tmp_path, monkeypatch):
    """Once for rows, model and length, although TRL's own key knows no length; training does not change."""
    calls, compute = [], trainer.compute_ref_log_probs

    def count(self, *args):
        calls.append(1)
        return compute(self, *args)

    monkeypatch.setattr(trainer, "compute_ref_log_probs", count)

    def calls_of(name: str, model: str = "dense", **options) -> int:
        calls.clear()
        train(recipe, folder, tmp_path / name, model, max_steps=2, **options)
        return len(calls)

    precomputed = dict(precompute_ref_log_probs=True)
    assert calls_of("first", **precomputed) > 0
    assert calls_of("again", **precomputed) == 0
    assert calls_of("short", max_length=48, **precomputed) > 0
    assert calls_of("short again", max_length=48, **precomputed) == 0
    assert calls_of("other model", model="qwen3", **precomputed) > 0
    calls_of("direct", max_length=48)
    losses = [[row["loss"] for row in history(tmp_path / name) if "loss" in row] for name in ("short again", "direct")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- wrong data ---

REFUSED = {
    "pairs for KTO": ("kto", "pairs.jsonl", r"kind preference .*train on them with rlhf/dpo.py \(or orpo.py"),
    "labels for DPO": ("dpo", "labels.jsonl", "kind kto .*train on them with rlhf/kto.py"),
    "labels for ORPO": ("orpo", "labels.jsonl", "kind kto .*train on them with rlhf/kto.py"),
    "labels for SimPO": ("simpo", "labels.jsonl", "kind kto .*train on them with rlhf/kto.py"),
    "labels for a reward model": ("reward", "labels.jsonl", "kind kto .*train on them with rlhf/kto.py"),
    "one label": ("kto", "good.jsonl", "all 14 answers are labeled good; fine-tune on them with sft/sft.py"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_wrong_data_is_told_in_one_line(mistake, folder, tmp_path):
    recipe, file, message = REFUSED[mistake]
    with pytest.raises(UserError, match=message) as error:
        train(recipe, folder, tmp_path / "run", train_files=[str(folder / file)])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


OPTIONS = {
    "loss of KTO": ("kto", {"loss_type": "sigmoid"}, "loss_type"),
    "batch of one": ("kto", {"per_device_train_batch_size": 1}, "batch size must be > 1"),
    "loss of SimPO": ("simpo", {"loss_type": "nosuch"}, "loss_type"),
    "samples of scores": ("reward", {"sample_prompts": ["q"]}, "a reward model scores answers"),
    "LoRA of words": ("reward", {"use_peft": True, "lora_task_type": "SEQ_2_SEQ_LM"}, "this recipe needs SEQ_CLS"),
    "short": ("reward", {"max_length": 4}, "max_length 4"),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_options_that_no_run_can_use(mistake, folder, tmp_path):
    recipe, options, message = OPTIONS[mistake]
    with pytest.raises(UserError, match=message):
        train(recipe, folder, tmp_path / "run", **options)
