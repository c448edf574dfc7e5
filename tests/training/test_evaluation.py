"""An evaluation has one result, whatever the batch size, the packing and the number of processes."""

import json
import math
import os
import random
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import GQA, make_model
from tiny_shards import Shard, write_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.rlhf.dpo_trainer import TokenizedDPOTrainer
from buddygpt.rlhf.pairs import CPOConfig, TokenizedCPOTrainer, join_answers
from buddygpt.training.evaluation import average_over_tokens

WORDS = {"<|end|>": 0, "<|pad|>": 1} | {f"w{number}": number for number in range(2, 97)}
OPTIONS = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True)
# 13 rows: very different numbers of tokens that count, and no multiple of any batch size below.
LENGTHS = [
    (40, 30),
    (9, 1),
    (30, 2),
    (60, 50),
    (5, 3),
    (8, 1),
    (50, 1),
    (6, 5),
    (12, 4),
    (33, 20),
    (7, 2),
    (9, 8),
    (4, 2),
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def labeled_rows() -> Dataset:
    numbers = random.Random(0)
    rows = []
    for length, counted in LENGTHS:
        ids = [numbers.randrange(2, 97) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length - counted) + ids[length - counted :]})
    return Dataset.from_list(rows)


def pairs() -> Dataset:
    numbers = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{numbers.randrange(2, 97)}" for _ in range(count))

    return Dataset.from_list(
        [{"prompt": words(3), "chosen": " " + words(counted), "rejected": " " + words(3)} for _, counted in LENGTHS]
    )


def tokenized_pairs() -> Dataset:
    tokenizer = tiny_tokenizer()
    return pairs().map(
        lambda row: {f"{key}_ids": tokenizer(row[key]).input_ids for key in ("prompt", "chosen", "rejected")},
        remove_columns=["prompt", "chosen", "rejected"],
    )


def make_trainer(kind: str, folder: Path, batch_size: int, **options) -> Trainer:
    options = OPTIONS | dict(output_dir=str(folder), per_device_eval_batch_size=batch_size) | options
    model = make_model(**GQA)
    if kind == "pretrain":
        blocks = BlockDataset(folder / "shards", block_size=16)
        options.pop("gradient_checkpointing")
        return Trainer(model, TrainingArguments(**options), train_dataset=blocks, eval_dataset=blocks)
    data = {"processing_class": tiny_tokenizer()}
    if kind == "sft":
        rows = labeled_rows()
        args = SFTConfig(**options, max_length=64)
        return SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, **data)
    if kind.startswith("cpo "):
        args = CPOConfig(**options, loss_type=kind.split()[1], simpo_gamma=1.0, cpo_alpha=0.5, max_length=64)
        args.remove_unused_columns = False
        rows = join_answers(tokenized_pairs(), 64)
        return TokenizedCPOTrainer(
            model, args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
        )
    reference = make_model(seed=1, **GQA)
    args = DPOConfig(**options, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    return TextDPOTrainer(model, reference, args, train_dataset=pairs(), eval_dataset=pairs(), **data)


class TextDPOTrainer(TokenizedDPOTrainer):
    """The trainer of rlhf/dpo.py, for rows of text."""

    _prepare_dataset = DPOTrainer._prepare_dataset


def evaluate(kind: str, folder: Path, batch_size: int, **options) -> dict[str, float]:
    trainer = make_trainer(kind, folder, batch_size, **options)
    average_over_tokens(trainer)
    metrics = trainer.evaluate()
    speed = ("runtime", "per_second", "preparation_time")
    return {key: value for key, value in metrics.items() if not key.endswith(speed)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_shards(folder / "shards", [Shard("a.ds", "a", [16 * 13])])
    return folder


def expected_of_sft() -> dict[str, float]:
    """Sums over all tokens that count, from the model alone."""
    model, loss, entropy, correct, tokens = make_model(**GQA), 0.0, 0.0, 0, 0
    for row in labeled_rows():
        labels = torch.tensor(row["labels"][1:])
        counted = labels != -100
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1][counted]
        logs = logits.log_softmax(-1)
        loss -= logs.gather(1, labels[counted, None]).sum().item()
        entropy -= (logs.exp() * logs).sum().item()
        correct += (logits.argmax(-1) == labels[counted]).sum().item()
        tokens += int(counted.sum())
    return {"eval_loss": loss / tokens, "eval_entropy": entropy / tokens, "eval_mean_token_accuracy": correct / tokens}


@pytest.mark.slow
def test_sft_is_a_mean_over_tokens(folder):
    expected = expected_of_sft()
    for batch_size in (1, 2, 8, 40):
        for packing in (False, True):
            measured = evaluate("sft", folder, batch_size, packing=packing, dataloader_drop_last=True)
            for key, value in expected.items():
                assert measured[key] == pytest.approx(value, rel=1e-5), (key, batch_size, packing)


def expected_of_dpo() -> float:
    """Sigmoid of the difference in log-probability, and half the mean over pairs of the mean over chosen tokens."""
    models, total = (make_model(**GQA), make_model(seed=1, **GQA)), 0.0
    tokenizer = tiny_tokenizer()
    for row in pairs():
        sums = []
        start = len(tokenizer(row["prompt"]).input_ids)
        for key in ("chosen", "rejected"):
            ids = torch.tensor([[*tokenizer(row["prompt"] + row[key]).input_ids, tokenizer.eos_token_id]])
            for model in models:
                with torch.no_grad():
                    logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
                sums.append(logs.sum().item())
            if key == "chosen":
                likelihood = sums[0] / len(logs)
        difference = 0.1 * ((sums[0] - sums[1]) - (sums[2] - sums[3]))
        total += math.log1p(math.exp(-difference)) - 0.5 * likelihood
    return total / len(pairs())


@pytest.mark.slow
def test_dpo_is_a_mean_over_pairs_and_tokens(folder):
    whole = evaluate("dpo", folder, 13)
    assert len(whole) > 8
    assert whole["eval_loss"] == pytest.approx(expected_of_dpo(), rel=1e-4)
    for batch_size in (1, 2, 5):
        assert evaluate("dpo", folder, batch_size) == pytest.approx(whole, rel=1e-4, abs=1e-5)


def expected_of_cpo(loss_type: str) -> float:
    """A sigmoid of the difference in log-probability (of SimPO: per token), and half the likelihood as above."""
    model, total = make_model(**GQA), 0.0
    for row in tokenized_pairs():
        means, sums = [], []
        for key in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[key]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(row[key]) :]
            means.append(logs.mean().item())
            sums.append(logs.sum().item())
        compared, margin = (means, 1.0) if loss_type == "simpo" else (sums, 0.0)
        total += math.log1p(math.exp(-(0.1 * (compared[0] - compared[1]) - margin))) - 0.5 * means[0]
    return total / len(pairs())


@pytest.mark.slow
def test_cpo_and_simpo_with_likelihood_are_means_over_pairs(folder):
    for loss_type in ("sigmoid", "simpo"):
        for batch_size in (1, 5, 13):
            measured = evaluate(f"cpo {loss_type}", folder, batch_size)
            assert measured["eval_loss"] == pytest.approx(expected_of_cpo(loss_type), rel=1e-4), (
                loss_type,
                batch_size,
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "cpo simpo"])
def test_a_step_on_pairs_is_the_same_however_they_are_split(kind, folder, tmp_path):
    """Also of the likelihood of chosen answers of 1 to 50 tokens: it is the mean over pairs of their means."""
    results = []
    for size in (1, 2, 8):
        step = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1)
        step |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=0, save_strategy="no", logging_steps=1)
        trainer = make_trainer(kind, tmp_path, 4, **step)
        loss = trainer.train().training_loss
        results.append([loss, *torch.cat([each.flatten() for each in trainer.model.parameters()]).tolist()])
    assert results[0] == pytest.approx(results[2], rel=1e-3, abs=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-3, abs=1e-5)


def evaluate_in_child(rank: int, port: int, folder: Path) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    results = {}
    for kind in ("pretrain", "sft", "dpo"):
        for batch_size in (1, 2, 5, 8):
            results[f"{kind} {batch_size}"] = evaluate(kind, folder, batch_size)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(folder):
    context = get_context("spawn")
    port = random.randint(20_000, 40_000)
    children = [context.Process(target=evaluate_in_child, args=(rank, port, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0]
    for name, measured in json.loads((folder / "results.json").read_text()).items():
        assert measured == pytest.approx(evaluate(name.split()[0], folder, 4), rel=1e-4, abs=1e-5), name
