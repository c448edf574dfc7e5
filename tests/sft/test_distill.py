"""Distillation trains every student, from stored predictions and on its own answers, and resumes bit for bit."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import history, run
from tiny_models import same_weights, save_random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from buddygpt.cli.errors import UserError
from buddygpt.training.distillation import StoredTeacherTrainer
from buddygpt.training.teacher_targets import StoredTargets


@pytest.fixture(scope="module")
def teachers(workspace) -> dict[str, Path]:
    return {kind: save_random_model(kind, workspace) for kind in ("qwen3", "mixture")}


@pytest.fixture(scope="module")
def targets(workspace, teachers) -> Path:
    """The predictions of a stock Qwen3, all of its vocabulary."""
    store(workspace, teachers["qwen3"], workspace / "targets", "--top_k", 1000)
    return workspace / "targets"


def store(workspace: Path, teacher: Path, output: Path, *options: object) -> None:
    rows = workspace / "sample" / "sft_eval.jsonl"
    options = ["--train_files", rows, "--max_length", 128, "--output", output, *options]
    run("tools/store_teacher.py", "--teacher", teacher, *options)


def distill(workspace: Path, student: Path, output: Path, *options: object) -> None:
    rows = workspace / "sample" / "sft_eval.jsonl"
    data = ["--train_files", rows, "--eval_files", rows, "--model_name_or_path", student]
    run("sft/distill.py", "--config", "sft/configs/debug-distill.yaml", *data, "--output_dir", output, *options)


def on_policy(workspace: Path, student: Path, teacher: Path, output: Path, *options: object) -> None:
    config = workspace / "on_policy.yaml"
    lines = Path(__file__).parents[2].joinpath("sft/configs/debug-distill.yaml").read_text().splitlines()
    dropped = ("method", "teacher_targets", "assistant_only_loss", "packing", "max_length", "#")
    config.write_text("\n".join(line for line in lines if not line.startswith(dropped)))
    rows = workspace / "sample" / "sft_eval.jsonl"
    data = ["--train_files", rows, "--model_name_or_path", student, "--teacher_model_name_or_path", teacher]
    data += ["--eval_files", rows, "--per_device_eval_batch_size", 64, "--max_completion_length", 16]
    run("sft/distill.py", "--config", config, "--method", "on_policy", *data, "--output_dir", output, *options)


def check_run(folder: Path) -> None:
    logs = history(folder)
    for row in logs:
        assert all(math.isfinite(row[key]) for key in ("loss", "grad_norm", "tokens_per_second") if "loss" in row)
        assert "mfu" not in row or "loss" not in row or row["mfu"] > 0
    assert [row["step"] for row in logs if "eval_loss" in row] == [3, 6]
    card = json.loads((folder / "run.json").read_text())
    assert card["recipe"] == "distill" and {"loss_curve.png", "samples.md"} <= {path.name for path in folder.iterdir()}
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture", "qwen3"])
def test_every_student_learns_from_stored_predictions_and_resumes(kind, workspace, teachers, targets, base, tmp_path):
    student = base if kind == "dense" else teachers[kind]
    options = ["--teacher_targets", targets]
    distill(workspace, student, tmp_path / "whole", *options)
    check_run(tmp_path / "whole")
    assert not same_weights(tmp_path / "whole", student)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    distill(workspace, student, tmp_path / "resumed", *options)
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")
    losses = [row["loss"] for row in history(tmp_path / "whole") if "loss" in row]
    if kind == "qwen3":  # its own teacher: nothing to learn at first
        assert losses[0] == pytest.approx(0, abs=0.01)
    else:
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_only_answers_and_their_end_marks_carry_loss(workspace, targets, base, tmp_path, monkeypatch):
    """In the batches that the trainer feeds, packed and padded: the target of a token is what the teacher predicts."""
    seen = []

    def recorded(trainer, model, inputs, **rest):
        if trainer.model.training:
            seen.append((inputs["input_ids"], inputs["labels"]))
        return compute_loss(trainer, model, inputs, **rest)

    compute_loss = StoredTeacherTrainer.compute_loss
    monkeypatch.setattr(StoredTeacherTrainer, "compute_loss", recorded)
    options = ["--teacher_targets", targets, "--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no"]
    for packing in ("true", "false"):
        distill(
            workspace, base, tmp_path / packing, *options, "--packing", packing, "--per_device_train_batch_size", 8
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    teacher = AutoModelForCausalLM.from_pretrained(workspace / "qwen3").eval()
    rows = [json.loads(line) for line in (workspace / "sample" / "sft_eval.jsonl").open(encoding="utf-8")]
    answers = {turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"}
    stored, checked = StoredTargets(targets), 0
    for ids, numbers in seen:
        for row, marked in zip(ids, numbers, strict=True):
            text = tokenizer.decode([token for token, number in zip(row, marked, strict=True) if number >= 0])
            parts = text.split("<|im_end|>")
            assert parts.pop() == "" and parts and all(part.strip() in answers for part in parts)
            checked += len(parts)
        if len(ids) > 1:  # one conversation a row
            with torch.no_grad():
                log_probs = teacher(ids).logits[:, :-1].log_softmax(-1)[numbers[:, 1:] >= 0]
            found = stored.read(numbers[:, 1:][numbers[:, 1:] >= 0])
            dense = torch.zeros_like(log_probs).scatter(-1, found.token_ids.long(), found.weights.float())
            torch.testing.assert_close(dense, log_probs.exp(), atol=1e-3, rtol=1e-2)
    assert checked > 30


@pytest.mark.slow
def test_without_the_teachers_share_it_is_the_usual_loss(workspace, targets, base, tmp_path):
    """Also with few stored tokens, LoRA and gradient accumulation."""
    options = ["--eval_strategy", "no", "--max_steps", 3, "--gradient_accumulation_steps", 2, "--logging_steps", 1]
    distill(workspace, base, tmp_path / "labels", "--teacher_targets", targets, "--label_weight", 1, *options)
    config = ["--config", "sft/configs/debug.yaml", "--model_name_or_path", base]
    rows = workspace / "sample" / "sft_eval.jsonl"
    run("sft/sft.py", *config, "--train_files", rows, "--eval_files", rows, *options, "--output_dir", tmp_path / "sft")
    assert same_weights(tmp_path / "labels", tmp_path / "sft")

    store(workspace, workspace / "mixture", tmp_path / "few", "--top_k", 4, "--samples", 4)
    lora = ["--use_peft", "true", "--lora_r", 4, "--label_weight", 0.3]
    distill(workspace, base, tmp_path / "lora", "--teacher_targets", tmp_path / "few", *lora, *options)
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="its teacher_targets_sha256 was"):
        distill(workspace, base, tmp_path / "labels", "--teacher_targets", tmp_path / "few", *options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_student_learns_on_its_own_answers(kind, workspace, teachers, base, tmp_path):
    student = base if kind == "dense" else teachers[kind]
    on_policy(workspace, student, teachers["qwen3"], tmp_path / "whole")
    check_run(tmp_path / "whole")
    losses = [row["loss"] for row in history(tmp_path / "whole") if "loss" in row]
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    on_policy(workspace, student, teachers["qwen3"], tmp_path / "resumed")
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")


REFUSED = {
    "no targets": (["--method", "offline"], "give teacher_targets"),
    "not written": (["--teacher_targets", "STRANGE"], "no manifest.json"),
    "other length": (["--max_length", 64], r"max_length differs \(128, now 64\)"),
    "other rows": (["--train_files", "SAMPLE/sft_train.jsonl"], "the contents of train_files differs"),
    "pairs": (["--train_files", "SAMPLE/preference_eval.jsonl"], "kind preference.* rlhf/dpo.py"),
    "other cut": (["--packing_strategy", "wrapped"], "would cut rows in other places"),
    "weight": (["--label_weight", 1.5], "label_weight is 1.5"),
    "no method": (["--method", "gold"], "method"),
    "teacher": (["--teacher_model_name_or_path", "STRANGE"], "teacher_model_name_or_path"),
}


@pytest.mark.slow
def test_mistakes_are_refused_in_one_line(workspace, teachers, targets, base, tmp_path):
    places = {"STRANGE": str(tmp_path), "SAMPLE": str(workspace / "sample")}
    for name, (options, problem) in REFUSED.items():
        words = []
        for word in map(str, options):
            for place, path in places.items():
                word = word.replace(place, path)
            words.append(word)
        folder = "null" if name == "no targets" else targets
        with pytest.raises(UserError, match=problem) as refusal:
            distill(workspace, base, tmp_path / "run", "--teacher_targets", folder, *words)
        assert "\n" not in str(refusal.value), name
        assert not (tmp_path / "run").exists()

    other = shutil.copytree(teachers["qwen3"], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(other)
    difference = r"another vocabulary than the student .* 1 differ, first '<\|new\|>'"
    with pytest.raises(UserError, match=difference):
        on_policy(workspace, base, other, tmp_path / "run")
    with pytest.raises(UserError, match="rows, fewer than the 4096 questions of a step"):  # TRL would take no step
        on_policy(workspace, base, teachers["qwen3"], tmp_path / "run", "--per_device_train_batch_size", 4096)
    with pytest.raises(UserError, match=difference):
        store(workspace, other, tmp_path / "new", "--tokenizer", base)
    with pytest.raises(UserError, match="exists: delete it"):
        store(workspace, teachers["qwen3"], targets)


def test_the_trainer_extends_trls():
    """Its own part is the loss in training: evaluation is TRL's, so that eval_loss is comparable."""
    assert StoredTeacherTrainer.prediction_step is SFTTrainer.prediction_step
