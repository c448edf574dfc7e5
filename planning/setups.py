"""From the options of a recipe to the choices that change its memory."""

from typing import Any

from transformers import TrainingArguments

from buddygpt.planning.hardware import Machine
from buddygpt.planning.step_memory import Setup


def read_setup(
    stage: str,
    machine: Machine,
    args: Any,
    training: TrainingArguments,
    model_args: Any = None,
    zero_stage: int = 0,
) -> Setup:
    """Return the choices of a recipe that change its memory.

    SFT is counted as a step of pretraining on rows of `max_length`: TRL computes its loss in chunks, too. DPO is a
    step on two rows for each pair, with a frozen copy of the weights unless `precompute_ref_log_probs` is set. LoRA is
    counted as if all parameters were trained, which is more than it takes.

    Args:
        stage: "pretrain", "sft" or "dpo".
        machine: What it runs on.
        args: Options of the recipe's script.
        training: Options of its trainer.
        model_args: Options of the model, for SFT and DPO.
        zero_stage: What ZeRO divides.
    """
    mixed = training.bf16 or training.fp16
    dtype = args.dtype if model_args is None else model_args.dtype
    precision = "bf16_params" if dtype == "bfloat16" else "fp32_master" if mixed else "fp32"
    optimizer = args.optimizer or ("adamw_8bit" if "8bit" in str(training.optim) else "adamw")
    has_reference = stage == "dpo" and not training.precompute_ref_log_probs
    return Setup(
        precision=precision,
        optimizer=optimizer,
        block_size=args.block_size if stage == "pretrain" else (training.max_length or 1024),
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        accumulation=int(training.gradient_accumulation_steps),
        gpus=machine.count if machine.kind == "gpu" else 1,
        zero_stage=zero_stage,
        device="cpu" if machine.kind == "cpu" else "cuda",
        reference=(2 if precision == "bf16_params" else 4) if has_reference else 0,
    )


def tuned_rows(stage: str, training: TrainingArguments) -> int:
    """Return the rows of a micro-batch; DPO has two answers in each."""
    return training.per_device_train_batch_size * (2 if stage == "dpo" else 1)
