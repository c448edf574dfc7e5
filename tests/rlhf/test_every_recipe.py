"""Every recipe after pretraining, on every kind of model, equals a loss computed by hand, also in two processes.

The reference reads the batches that the trainers really fed: decoded, they are texts written by hand here, in which
marks enclose exactly what carries loss. It computes the loss of each sequence alone, without padding or packing.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import run
from hand_losses import LOSSES, Sequence, read_batch
from tiny_models import GQA, MLA, MOE, SIGMOID, make_model, same_weights
from tiny_tokenizer import train_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
)

pytestmark = pytest.mark.slow
MODELS = ("dense", "mixture", "qwen3", "llama")
LENGTH = 160  # tokens that are kept of a row
LONG = " ".join(map(str, range(250)))  # is cut off
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# Turns, and how they stand in the tokens; what follows the mark carries loss.
TURNS = {
    "system": ({"role": "system", "content": "Be brief."}, "system\nBe brief."),
    "question": ({"role": "user", "content": "春天？"}, "user\n春天？"),
    "other": ({"role": "user", "content": "The trees?"}, "user\nThe trees?"),
    "answer": ({"role": "assistant", "content": "唱歌。"}, "assistant\n⟦唱歌。"),
    "thought": (
        {"role": "assistant", "content": "<think>\n桃花\n</think>\n\n到了。"},
        "assistant\n⟦<think>\n桃花\n</think>\n\n到了。",
    ),
    "call": (
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        'assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    ),
    "result": ({"role": "tool", "content": "22"}, "user\n<tool_response>\n22\n</tool_response>"),
    "long": ({"role": "assistant", "content": LONG}, f"assistant\n⟦{LONG}"),
    "quick": ({"role": "assistant", "content": "是的！"}, "assistant\n<think>\n\n</think>\n\n⟦是的！"),
}
CHATS = (
    *("question answer", "system other answer question answer", "question call result answer"),
    *("question thought", "question quick", "other long"),
)
PAIRS = (
    ("question", "answer", "thought"),
    ("system other answer question", "call", "answer"),
    ("question call result", "answer", "thought"),
    ("other", "thought", "long"),
)
COMMON = dict(
    max_length=LENGTH,
    per_device_train_batch_size=4,
    max_steps=2,
    learning_rate=0.05,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=1e9,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    activation_checkpointing=False,
    report_to="none",
)
CHAT = dict(train_files="chats", assistant_only_loss=True)
ANSWERS = dict(train_files="questions", max_completion_length=8, max_length=None)


class Recipe(NamedTuple):
    script: str
    options: dict[str, Any]


RECIPES = {
    "sft": Recipe("sft/sft.py", CHAT),
    "sft-packed": Recipe("sft/sft.py", CHAT | dict(packing=True, per_device_train_batch_size=2)),
    "distill": Recipe("sft/distill.py", CHAT | dict(packing=True, per_device_train_batch_size=2)),
    "on-policy": Recipe("sft/distill.py", ANSWERS | dict(method="on_policy", beta=1.0)),
    "dpo": Recipe("rlhf/dpo.py", dict(train_files="pairs")),
    "kto": Recipe("rlhf/kto.py", dict(train_files="labels")),
    "orpo": Recipe("rlhf/orpo.py", dict(train_files="pairs")),
    "simpo": Recipe("rlhf/simpo.py", dict(train_files="pairs")),
    "reward": Recipe("rlhf/reward.py", dict(train_files="pairs")),
    "grpo": Recipe(
        "rlhf/grpo.py",
        ANSWERS | dict(rewards=["hand_losses:share_of_even_ids"], num_generations=4, loss_type="dapo", beta=0.04),
    ),
}


# --- rows, models, runs ---


def messages(names: str) -> list[dict[str, Any]]:
    return [TURNS[name][0] for name in names.split()]


def written(names: str) -> str:
    """Return the text of a chat, ⟦⟧ around what carries loss."""
    texts = (TURNS[name][1] for name in names.split())
    return "\n".join(f"<|im_start|>{text}<|im_end|>{'⟧' if '⟦' in text else ''}" for text in texts)


def unmarked(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def written_pairs() -> set[str]:
    prompts = ((unmarked(written(prompt)), answer) for prompt, *answers in PAIRS for answer in answers)
    return {f"{prompt}\n{written(answer)}" for prompt, answer in prompts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, random models of all kinds and a teacher, and rows of all kinds."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(folder))
    tokens = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=256, **tokens)
    stock = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=12)
    stock |= dict(num_key_value_heads=2, initializer_range=0.2)
    mixture = MLA | MOE | SIGMOID | dict(scoring_func="sigmoid")
    torch.manual_seed(0)
    models = {
        "dense": make_model(**GQA, **sizes),
        "mixture": make_model(**mixture, **sizes),
        "balanced": make_model(**mixture, aux_loss_alpha=0.05, z_loss_coef=0.01, **sizes),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes, **stock)),
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **stock)),
        "teacher": Qwen3ForCausalLM(Qwen3Config(**sizes, **stock)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    chats = [{"messages": messages(names)} for names in CHATS]
    chats[4]["chat_template_kwargs"] = {"enable_thinking": False}
    pairs = [dict(zip(("prompt", "chosen", "rejected"), map(messages, names), strict=True)) for names in PAIRS]
    labels = [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs
        for key in ("chosen", "rejected")
    ]
    questions = [{"prompt": pair["prompt"], "answer": "a"} for pair in pairs]
    for name, rows in {"chats": chats, "pairs": pairs, "labels": labels, "questions": questions}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    store = ["--teacher", folder / "teacher", "--train_files", folder / "chats.jsonl", "--max_length", LENGTH]
    run("tools/store_teacher.py", *store, "--top_k", 1000, "--output", folder / "targets")
    return folder


def write_config(recipe: str, folder: Path, model: str, output: Path, **changes: Any) -> list[str]:
    """Write the YAML of a run, and return its command."""
    config = COMMON | RECIPES[recipe].options | changes | {"output_dir": str(output)}
    config["train_files"] = [str(folder / f"{config['train_files']}.jsonl")]
    config["model_name_or_path"] = str(folder / model)
    if recipe == "distill":
        config["teacher_targets"] = str(folder / "targets")
    if recipe == "on-policy":
        config["teacher_model_name_or_path"] = str(folder / "teacher")
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return [RECIPES[recipe].script, "--config", str(path)]


def recorded(step: Callable, steps: list[dict[str, Any]]) -> Callable:
    """Wrap `Trainer.training_step`: keep the batch that the loss is computed of, the weights before, and the loss."""

    def training_step(trainer: Trainer, model, inputs, *args, **kwargs) -> torch.Tensor:
        compute_loss = trainer.compute_loss

        def compute_and_keep(model, batch, *rest, **options):
            state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            steps.append({"batch": {k: v for k, v in batch.items() if torch.is_tensor(v)}, "state": state})
            return compute_loss(model, batch, *rest, **options)

        trainer.compute_loss = compute_and_keep
        loss = step(trainer, model, inputs, *args, **kwargs)
        trainer.compute_loss = compute_loss
        steps[-1]["loss"] = loss.item()
        return loss

    return training_step


# --- comparisons ---


def check_step(recipe: str, folder: Path, model_name: str, output: Path, ranks: list[dict[str, Any]]) -> None:
    """Compare the loss and the weights after the last step of a run with those computed by hand.

    Args:
        ranks: The last step of each process, see `recorded`.
    """
    kind = AutoModelForSequenceClassification if recipe == "reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if recipe == "reward" else {}
    model = kind.from_pretrained(folder / model_name, **options)
    model.load_state_dict(ranks[0]["state"])
    start, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (model_name, "teacher"))
    for frozen in (start, teacher):
        frozen.requires_grad_(False)
    loss = LOSSES[recipe](model, start, teacher, [rank["batch"] for rank in ranks])
    loss.backward()
    # The teacher's probabilities are stored in half precision.
    tolerance = dict(rtol=1e-2, atol=2e-4) if recipe == "distill" else dict(rtol=1e-3, atol=1e-5)
    found = torch.tensor(sum(rank["loss"] for rank in ranks) / len(ranks))
    torch.testing.assert_close(found, loss.detach(), **tolerance)
    changed = 0
    trained = kind.from_pretrained(output).state_dict()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = parameter.detach() - COMMON["learning_rate"] * parameter.grad
            torch.testing.assert_close(trained[name], expected, **tolerance, msg=lambda text, n=name: f"{n}: {text}")
            changed += not torch.equal(expected, parameter)
    assert changed > 10


def check_texts(recipe: str, tokenizer, batches: list[dict[str, torch.Tensor]]) -> None:
    """Check that the batches contain exactly the rows of the file, cut to their length, and marks around the loss."""
    found = set()
    for batch in batches:
        for kind, rows in read_batch(batch).items():
            for row in rows if kind != "KL_" else ():
                assert len(row.ids) <= LENGTH + 8
                found.add(marked_text(tokenizer, row))
    if RECIPES[recipe].options["train_files"] == "questions":
        prompts = {unmarked(written(prompt)) + "\n<|im_start|>assistant\n" for prompt, *_ in PAIRS}
        assert {text[: text.index("⟦")] for text in found} <= prompts
        return
    expected = {written(names) for names in CHATS} if "chats" in RECIPES[recipe].options.values() else written_pairs()
    if recipe == "reward":  # scores whole pairs only
        expected = {text for text in expected if not text.startswith(unmarked(written("other")))}
        expected = {f"⟦{unmarked(text)}⟧" for text in expected}
    long = [text for text in expected if LONG in text]
    cut = [text for text in found if text not in expected]
    assert len(cut) == len(long) and all(whole.startswith(text[:-1]) for text, whole in zip(cut, long, strict=True))
    assert found - {*cut} == expected - {*long}


def marked_text(tokenizer, row: Sequence) -> str:
    parts = []
    for counts, tokens in groupby(zip(row.counts.tolist(), row.ids.tolist(), strict=True), key=lambda each: each[0]):
        text = tokenizer.decode([token for _, token in tokens])
        parts.append(f"⟦{text}⟧" if counts else text)
    return "".join(parts)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_step_are_those_computed_by_hand(recipe, model, folder, tmp_path, monkeypatch):
    steps: list[dict[str, Any]] = []
    monkeypatch.setattr(Trainer, "training_step", recorded(Trainer.training_step, steps))
    # All rows in two steps: the second starts from other weights than those of the reference.
    options = {"per_device_train_batch_size": 8} if recipe == "grpo" else {}
    run(*write_config(recipe, folder, model, tmp_path / "run", **options))
    assert len(steps) == 2
    check_texts(recipe, AutoTokenizer.from_pretrained(folder / model), [step["batch"] for step in steps])
    check_step(recipe, folder, model, tmp_path / "run", steps[-1:])


# --- several processes, killed processes ---


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have everything imported."""
    context = get_context("forkserver")
    recipes = ["buddygpt.sft.distill", "buddygpt.rlhf.pairs", "buddygpt.rlhf.grpo", "buddygpt.rlhf.reward"]
    context.set_forkserver_preload(["buddygpt.data.shards.blocks", "deepspeed", *recipes])
    return context


def run_in_child(words: list[str], environment: dict[str, str], output: Path, kill_at: int | None) -> None:
    sys.stdout = sys.stderr = (output.parent / f"log-{environment.get('RANK', 0)}").open("w", encoding="utf-8")
    os.environ.update(environment)
    torch.set_num_threads(1)
    steps: list[dict[str, Any]] = []
    step = Trainer.training_step
    if "RANK" in environment:
        Trainer.training_step = recorded(step, steps)
    elif kill_at is not None:

        def deadly(*args, **kwargs):
            result = step(*args, **kwargs)
            steps.append({})
            if len(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Trainer.training_step = deadly
    run(*words)
    if steps:
        torch.save(steps[-1], output.parent / f"step-{environment.get('RANK', 0)}.pt")


def launch(forks, words: list[str], output: Path, processes: int = 1, kill_at: int | None = None) -> list[int]:
    ranks: list[dict[str, str]] = [{"OMP_NUM_THREADS": "1"}]
    if processes > 1:
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(20_000, 40_000))}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    children = [forks.Process(target=run_in_child, args=(words, rank, output, kill_at)) for rank in ranks]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
        child.kill()
    return [child.exitcode for child in children]


def read_logs(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in sorted(folder.glob("log-*")))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "sft-packed"])
def test_two_processes_take_the_step_of_one_global_batch(recipe, folder, tmp_path, forks):
    output = tmp_path / "run"
    size = {"distill": 1, "reward": 1, "grpo": 4}.get(recipe, 2)
    steps = 1 if recipe == "reward" else 2  # it has three pairs
    words = write_config(recipe, folder, "mixture", output, per_device_train_batch_size=size, max_steps=steps)
    assert launch(forks, words, output, processes=2) == [0, 0], read_logs(tmp_path)
    ranks = [torch.load(tmp_path / f"step-{rank}.pt") for rank in range(2)]
    batches = [read_batch(rank["batch"]) for rank in ranks]
    read = [[row.ids.tolist() for kind in batch if kind != "KL_" for row in batch[kind]] for batch in batches]
    assert read[0] and all(row not in read[1] for row in read[0])
    check_step(recipe, folder, "mixture", output, ranks)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "sft-packed"])
def test_a_killed_run_ends_as_one_that_was_not(recipe, folder, tmp_path, forks):
    """SIGKILL in a random step after the first checkpoint."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3)
    words = {
        name: write_config(recipe, folder, "balanced", tmp_path / name, **options) for name in ("whole", "killed")
    }
    assert launch(forks, words["whole"], tmp_path / "whole") == [0], read_logs(tmp_path)
    kill_at = random.randint(3, 6)
    assert launch(forks, words["killed"], tmp_path / "killed", kill_at=kill_at) == [-signal.SIGKILL]
    assert launch(forks, words["killed"], tmp_path / "killed") == [0], read_logs(tmp_path)
    assert "Resuming from" in (tmp_path / "log-0").read_text(encoding="utf-8")
    assert same_weights(tmp_path / "killed", tmp_path / "whole"), kill_at
