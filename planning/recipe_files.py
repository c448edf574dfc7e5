"""The files of a recipe folder, as recipes/README.md describes it, from a plan."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from buddygpt.planning import rules
from buddygpt.planning.budget import Plan, model_config
from buddygpt.planning.hardware import GIB, Machine

PROJECT = Path(__file__).resolve().parents[1]
PROMPTS = ["你是谁？", "请写一首关于春天的诗。", "What is the capital of France?"]
EVALUATIONS = 8  # during a run


@dataclass(frozen=True)
class Inputs:
    """What a recipe reads.

    Attributes:
        sources: Entries of `sources` in data.yaml.
        tokenizer_files: Files to train the tokenizer on.
        text_keys: Columns of text.
        languages: Requested ratio of tokens, or None.
        anneal_sources: Entries of better text for the end of pretraining; empty: no such stage.
        chat, pairs: Inputs of convert_chat; empty: the bundled sample, and no pairs without it.
        eval_fraction: Share of documents to hold out.
        exams: "cmmlu" and "ceval" -> the folder of a local copy.
    """

    sources: list[Any]
    tokenizer_files: list[str]
    text_keys: list[str]
    languages: dict[str, float] | None
    anneal_sources: list[Any]
    chat: list[str]
    pairs: list[str]
    eval_fraction: float
    exams: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """A recipe to write: its name, the folder as its YAMLs name it, and what it is made of."""

    name: str
    folder: str
    machine: Machine
    hours: float
    plan: Plan
    inputs: Inputs


def recipe_files(recipe: Recipe) -> dict[str, str]:
    """Return the content of each file of the folder, other than README.md."""
    inputs = recipe.inputs
    stages = {
        "recipe": ("What this model is and where it is trained.", settings(recipe)),
        "tokenizer": ("A tokenizer of this text.", tokenizer(recipe)),
        "data": ("Text to token shards.", data(recipe, inputs.sources, "shards")),
        "pretrain": ("Pretraining.", pretrain(recipe)),
        "chat": ("Chats in their standard form.", convert(recipe, inputs.chat, "sft", 0.02)),
        "sft": ("Supervised fine-tuning.", sft(recipe)),
        "pairs": ("Preference pairs in their standard form.", convert(recipe, inputs.pairs, "preference", 0.1)),
        "dpo": ("Preference optimization.", dpo(recipe)),
        "eval": ("Bits per byte of the held-out text after each stage.", evaluation(recipe)),
    }
    if inputs.exams:
        tasks = inputs.exams | {"output": f"{recipe.folder}/tasks"}
        stages["exams"] = ("Task files of local exams.", tasks)
    if not inputs.chat or not inputs.pairs:
        stages["sample"] = ("The bundled sample: chats and pairs about facts.", {"output": f"{recipe.folder}/sample"})
    if inputs.anneal_sources:
        better = data(recipe, inputs.anneal_sources, "anneal_shards")
        stages["anneal_data"] = ("Better text for the end of pretraining.", better)
        stages["anneal"] = ("The end of pretraining: the learning rate falls on better text.", anneal(recipe))
    files = {f"{name}.yaml": f"# {title}\n{to_yaml(content)}" for name, (title, content) in stages.items()}
    files["model.json"] = json.dumps(model_config(recipe.plan.run.shape, recipe.plan.run.block_size), indent=2) + "\n"
    if hardware := own_hardware(recipe.machine):
        files["accelerate.yaml"] = hardware
    files["run.sh"] = (
        "#!/usr/bin/env bash\n# From text to a chat model; stop and repeat it at any time. --dry_run only checks.\n"
        f'exec bash "{PROJECT}/runs/recipe.sh" "$(dirname "$0")" "$@"\n'
    )
    return files


def to_yaml(content: dict[str, Any]) -> str:
    """Return YAML with a key per line, and lists in one line."""
    lines = []
    for key, value in content.items():
        if key == "sources":
            entries = [f"  - {_inline(entry)}" for entry in value]
            lines += [f"{key}:", *entries]
        else:
            lines.append(f"{key}: {_inline(value)}")
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"  # YAML 1.1 reads 1e-3 as text
    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n...\n").removesuffix("\n")


def settings(recipe: Recipe) -> dict[str, Any]:
    machine = recipe.machine
    content: dict[str, Any] = {"name": recipe.name, "output": recipe.folder}
    files = {"cpu": "cpu.yaml", "apple": "mps.yaml", "gpu": "single_gpu.yaml"}
    if not own_hardware(machine):
        content["accelerate_config"] = f"accelerate_configs/{files[machine.kind]}"
    if machine.kind == "cpu":
        content |= {"gpu": "cpu", "threads": machine.count}
    else:
        memory = f"{machine.memory / GIB:.2f}GiB"
        content |= {"gpu": machine.name, "gpus": machine.count, "memory": memory}
    needs = [f"{recipe.plan.disk / 1e9:.1f} GB of disk", f"{recipe.plan.peak / GIB:.2f} GiB of memory for training"]
    return content | {"hours": float(recipe.hours), "needs": needs}


def own_hardware(machine: Machine) -> str:
    """Return an accelerate config if no file of accelerate_configs/ suits: several GPUs, or no bfloat16."""
    if machine.kind != "gpu" or (machine.count == 1 and machine.has_bf16):
        return ""
    several = machine.count > 1
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if several else "NO",
        "num_machines": 1,
        "num_processes": machine.count,
        "mixed_precision": "bf16" if machine.has_bf16 else "fp16",
        "use_cpu": False,
    }
    return f"# {machine.title}, the whole model on each.\n{to_yaml(content)}"


def tokenizer(recipe: Recipe) -> dict[str, Any]:
    return {
        "files": recipe.inputs.tokenizer_files,
        "output": f"{recipe.folder}/tokenizer",
        "vocab_size": recipe.plan.run.shape.vocab_size,
        "text_column": recipe.inputs.text_keys,
        "max_bytes": 20_000_000 if recipe.machine.kind == "cpu" else 50_000_000,
    }


def data(recipe: Recipe, sources: list[Any], folder: str) -> dict[str, Any]:
    content = {
        "sources": sources,
        "text_key": recipe.inputs.text_keys,
        "languages": recipe.inputs.languages,
        "clean": "text",
        "deduplicate": "minhash",
        "decontaminate": list(recipe.inputs.exams.values()) or None,
        "tokenizer": f"{recipe.folder}/tokenizer",
        "output": f"{recipe.folder}/{folder}",
        "eval_fraction": recipe.inputs.eval_fraction,
        "on_bad_row": "skip",
        "workers": min(8, recipe.machine.count) if recipe.machine.kind == "cpu" else 8,
    }
    return {key: value for key, value in content.items() if value is not None}


def precision(machine: Machine) -> dict[str, bool]:
    """Return the options that a trainer needs on this machine."""
    if machine.kind == "cpu":
        return {"bf16": False, "use_cpu": True}
    if machine.kind == "apple":
        return {"bf16": False, "use_cpu": False}
    return {"bf16": machine.has_bf16} | ({} if machine.has_bf16 else {"fp16": True})


def logging(steps: int, evaluations: int = EVALUATIONS) -> dict[str, Any]:
    """Return how often a run of so many steps logs, evaluates and saves. The last step always does."""
    every = math.ceil(steps / evaluations)
    return {
        "logging_steps": max(1, min(20, steps // 20)),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
    }


def pretrain(recipe: Recipe) -> dict[str, Any]:
    plan, run, folder = recipe.plan, recipe.plan.run, recipe.folder
    steps = run.steps
    content = {
        "train_data": f"{folder}/shards/train",
        "eval_data": f"{folder}/shards/eval",
        "tokenizer": f"{folder}/tokenizer",
        "model_config": f"{folder}/model.json",
        "block_size": run.block_size,
        "per_device_train_batch_size": plan.rows,
        "gradient_accumulation_steps": plan.accumulation,
    }
    schedule = {"max_steps": steps} | decay_in_the_last(run.decay_steps)
    if recipe.inputs.anneal_sources:
        stable = steps - anneal_steps(steps)
        schedule = {"max_steps": stable, "lr_scheduler_type": "constant_with_warmup"}
    optimization = {
        "optimizer": run.optimizer,
        "learning_rate": run.learning_rate,
        "optim_args": f"adamw_lr={run.embedding_rate:g}",
        "warmup_steps": run.warmup_steps,
        "weight_decay": rules.WEIGHT_DECAY,
        "adam_beta2": 0.95,
        "activation_checkpointing": plan.checkpointing,
    }
    output = {"output_dir": f"{folder}/pretrain", "per_device_eval_batch_size": plan.rows}
    prompts = {"sample_prompts": ["春眠不觉晓，", "中国的首都是", "The capital of France is"]}
    logs = logging(schedule["max_steps"])
    return content | schedule | optimization | precision(recipe.machine) | output | logs | prompts


def decay_in_the_last(steps: int) -> dict[str, Any]:
    """Return the schedule whose rate falls in the last so many steps."""
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": steps,
            "decay_type": "linear",
            "min_lr_ratio": rules.END_OF_DECAY,
        },
    }


def anneal_steps(steps: int) -> int:
    return max(1, round(steps * rules.DECAY_SHARE * 0.5))


def anneal(recipe: Recipe) -> dict[str, Any]:
    content = pretrain(recipe)
    stable, folder = content["max_steps"], recipe.folder
    steps = anneal_steps(recipe.plan.run.steps)
    del content["model_config"]
    content |= {
        "train_data": f"{folder}/anneal_shards/train",
        "eval_data": f"{folder}/shards/eval",
        "model_name_or_path": f"{folder}/pretrain/checkpoint-{stable}",
        "keep_optimizer": True,
        "max_steps": steps,
        "warmup_steps": 0,
        "output_dir": f"{folder}/anneal",
    }
    return content | decay_in_the_last(steps) | logging(steps)


def convert(recipe: Recipe, files: list[str], kind: str, held_out: float) -> dict[str, Any]:
    stem = {"sft": "sft", "preference": "preference"}[kind]
    return {
        "input": files or [f"{recipe.folder}/sample/{stem}_train.jsonl"],
        "on_bad_row": "skip",
        "output": f"{recipe.folder}/{stem}_train.jsonl",
        "eval_fraction": held_out,
        "eval_output": f"{recipe.folder}/{stem}_eval.jsonl",
    }


def tune(recipe: Recipe, stage: str, base: str) -> dict[str, Any]:
    """Return what SFT and DPO have in common."""
    numbers = recipe.plan.sft if stage == "sft" else recipe.plan.dpo
    rows = {"sft": "sft", "dpo": "preference"}[stage]
    content = {
        "train_files": [f"{recipe.folder}/{rows}_train.jsonl"],
        "eval_files": [f"{recipe.folder}/{rows}_eval.jsonl"],
        "model_name_or_path": f"{recipe.folder}/{base}",
        "train_on_unfit_data": True,  # the plan chose short rows: what does not fit is left out, and counted
        "max_length": numbers.length,
        "per_device_train_batch_size": numbers.rows,
        "gradient_accumulation_steps": numbers.accumulation,
        "max_steps": numbers.steps,
        "learning_rate": numbers.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, numbers.steps // 20),
        "activation_checkpointing": recipe.plan.checkpointing,
    }
    output = {"output_dir": f"{recipe.folder}/{stage}", "per_device_eval_batch_size": numbers.rows}
    logs = logging(numbers.steps, evaluations=2)
    return content | precision(recipe.machine) | output | logs | {"sample_prompts": PROMPTS}


def sft(recipe: Recipe) -> dict[str, Any]:
    base = "anneal" if recipe.inputs.anneal_sources else "pretrain"
    return {"assistant_only_loss": True, "packing": True} | tune(recipe, "sft", base)


def dpo(recipe: Recipe) -> dict[str, Any]:
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.1}
    return losses | {"precompute_ref_log_probs": True} | tune(recipe, "dpo", "sft")


def evaluation(recipe: Recipe) -> dict[str, Any]:
    base = "anneal" if recipe.inputs.anneal_sources else "pretrain"
    folders = {"base": base, "sft": "sft", "dpo": "dpo"}
    names = {"cmmlu": "cmmlu", "ceval": "ceval-valid"}
    exams = [names[name] for name in recipe.inputs.exams]
    return {
        "checkpoints": [f"{name}={recipe.folder}/{folder}" for name, folder in folders.items()],
        "chat": ["sft", "dpo"],
        "tasks": ["heldout_text", *exams],
        **({"include_path": [f"{recipe.folder}/tasks"]} if exams else {}),
        "heldout_text": f"{recipe.folder}/shards/eval.jsonl",
        "output": f"{recipe.folder}/eval",
        "limit": 20 if recipe.machine.kind == "cpu" else 500,  # of each task
    }
