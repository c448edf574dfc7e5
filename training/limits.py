"""Refuse numbers and folders that no run can use, before anything is loaded.

transformers and TRL take them as they are: a run then trains nothing, in another way than requested, or fails late.
"""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedConfig, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from buddygpt.cli.errors import UserError

MAX_NAME_BYTES = 255  # of a file or folder, on all common file systems

ABOVE_0 = 1e-9
# The smallest and the largest value of options of TrainingArguments, TRL, LoRA and our own. What an option is by
# default is allowed, too, such as -1 for max_steps. "Class.option" is for one class whose option has another meaning.
RANGES: dict[str, tuple[float, float]] = {
    # schedule
    "max_steps": (1, 10**9),
    "num_train_epochs": (ABOVE_0, 10**6),
    "warmup_steps": (0, 10**9),
    "logging_steps": (ABOVE_0, 10**9),  # a share of all steps if below 1
    "eval_steps": (ABOVE_0, 10**9),
    "save_steps": (ABOVE_0, 10**9),
    "save_total_limit": (1, 10**9),
    "replay_step": (1, 10**9),
    # rows
    "block_size": (2, 10**9),
    "max_length": (2, 10**9),
    "pad_to_multiple_of": (1, 2**16),
    "per_device_train_batch_size": (1, 2**16),
    "per_device_eval_batch_size": (1, 2**16),
    "precompute_ref_batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 2**20),
    "eval_accumulation_steps": (1, 10**9),
    "dataloader_num_workers": (0, 1024),
    "dataset_num_proc": (1, 1024),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    # optimizer
    "learning_rate": (0, 1),
    "weight_decay": (0, 10),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 10**9),
    # loss
    "label_smoothing_factor": (0, 0.999999),
    "label_smoothing": (0, 0.499999),  # DPO: the share of pairs in the wrong order
    "neftune_noise_alpha": (0, 1000),
    "loss_weights": (0, 10**6),
    "beta": (ABOVE_0, 1000),
    "GRPOConfig.beta": (0, 1000),  # 0: no reference model
    "RLOOConfig.beta": (0, 1000),
    "ORPOConfig.beta": (0, 1000),  # 0: the likelihood of the chosen answers only
    "DistillationConfig.beta": (0, 1),  # 0: forward KL divergence
    "desirable_weight": (0, 1000),  # 0: only bad answers are learned from
    "undesirable_weight": (0, 1000),
    "ld_alpha": (0, 1),
    # answers that reinforcement learning and distillation generate
    "max_completion_length": (1, 10**9),
    "num_generations": (2, 2**16),
    "num_generations_eval": (1, 2**16),
    "temperature": (ABOVE_0, 100),
    "top_p": (ABOVE_0, 1),
    "top_k": (0, 10**9),
    "min_p": (0, 1),
    "repetition_penalty": (ABOVE_0, 100),
    "epsilon": (0, 1000),
    "epsilon_high": (0, 1000),
    "num_iterations": (1, 1000),
    "steps_per_generation": (1, 2**20),
    "discopop_tau": (ABOVE_0, 1000),
    "ref_model_mixup_alpha": (0, 1),
    "ref_model_sync_steps": (1, 10**9),
    # LoRA
    "lora_r": (1, 2**16),
    "lora_alpha": (1, 2**20),
    "lora_dropout": (0, 0.999999),
}


def require_limits(*arguments: Any) -> None:
    """Raise UserError if a number, a `*_kwargs`, `report_to` or `output_dir` of these dataclasses cannot be used."""
    for dataclass in arguments:
        for option in fields(dataclass):
            value = getattr(dataclass, option.name)
            limits = RANGES.get(f"{type(dataclass).__name__}.{option.name}", RANGES.get(option.name))
            if limits and value is not None and value != option.default:
                _require_range(option.name, value, *limits)
            if option.name.endswith("_kwargs") and isinstance(value, str):
                raise UserError(f"`{option.name}` is {value}; write a mapping, such as '{{\"key\": 1}}'")
        if isinstance(dataclass, TrainingArguments):
            require_writable_folder("output_dir", dataclass.output_dir)
            _require_trackers(dataclass.report_to)


def _require_range(key: str, value: Any, low: float, high: float) -> None:
    for number in value if isinstance(value, list) else [value]:
        if not low <= number <= high:
            above = "above 0 and up to" if low == ABOVE_0 else f"from {low:,} to"
            raise UserError(f"`{key}` is {number:,}; use a number {above} {high:,}")


def require_choices(args: TrainingArguments, choices: dict[str, tuple[str, ...]]) -> None:
    """Raise UserError if an option has a value that TRL would refuse only after the first step has begun.

    Args:
        choices: The values that TRL knows, by option. Options that `args` does not have are skipped.
    """
    for key, known in choices.items():
        value = getattr(args, key, known[0])
        for name in value if isinstance(value, list) else [value]:
            if name not in known:
                raise UserError(f"`{key}` is {name}, must be one of {', '.join(known)}")


def _require_trackers(names: list[str]) -> None:
    for name in names:
        if name in INTEGRATION_TO_CALLBACK and name not in (*get_available_reporting_integrations(), "flyte"):
            raise UserError(f"report_to: {name} is not installed: pip install {name}, or use report_to: none")


def require_writable_folder(key: str, name: str) -> None:
    """Raise UserError if a folder cannot be made, or written to, under this name. Creates nothing.

    Args:
        key: The option that names the folder, for the message.
        name: Its value.
    """
    if name.strip() in ("", "trainer_output"):  # what transformers writes to if no folder is named
        raise UserError(f"`{key}` is empty; name a folder")
    for part in Path(name).parts:
        if len(os.fsencode(part)) > MAX_NAME_BYTES:
            raise UserError(f"`{key}` has a name of {len(part)} characters, {part[:20]}...; use a shorter one")
    existing = Path(name)
    while not os.path.lexists(existing):
        existing = existing.parent
    if existing.is_symlink() and not existing.exists():
        raise UserError(
            f"`{key}` is {name}, but {existing} is a link to {os.readlink(existing)}, which does not exist; make that "
            "folder, or name another"
        )
    if not existing.is_dir():
        raise UserError(f"`{key}` is {name}, but {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"`{key}` is {name}, but {existing} cannot be written; name another folder, or permit it")


def require_memory(config: PreTrainedConfig, args: TrainingArguments, bytes_per_weight: int) -> None:
    """Raise UserError if a new model is larger than the memory of this machine.

    On a CPU, training needs the weights, their gradients and two states of Adam there. For a GPU, only the weights are
    made there. Only the largest matrices are counted.
    """
    if is_deepspeed_zero3_enabled():  # makes each process's share only
        return
    sizes = {key: getattr(config, key, 0) or 0 for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    vocabulary, hidden, layers = sizes.values()
    weights = hidden * (vocabulary + layers * (hidden + (getattr(config, "intermediate_size", 0) or 0)))
    needed = weights * bytes_per_weight * (4 if args.device.type == "cpu" else 1)
    available = psutil.virtual_memory().total
    if needed > available:
        shape = ", ".join(f"{key} {value:,}" for key, value in sizes.items())
        raise UserError(
            f"a model of {shape} needs at least {math.ceil(needed / 2**30):,} GiB of memory, this machine has "
            f"{available // 2**30:,}; make it smaller"
        )
