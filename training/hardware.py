"""What a run was asked to be, and what it really is: no less than was asked for, printed, and kept in the run card.

accelerate falls back without a word: to one process, to several that train alone and write the same folder, to DDP in
place of FSDP or DeepSpeed, to the processor. What was asked for is read from the arguments and from the environment
that `accelerate launch` and torchrun hand to their processes (accelerate/utils/launch.py); what is, from the
`Accelerator` and the model that it has wrapped.
"""

import os
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import import_utils, is_kernels_available

from buddygpt.cli.errors import UserError
from buddygpt.training.callbacks.experts import find_routers
from buddygpt.training.extensions import release_extensions
from buddygpt.training.run_card import write_run_card

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's; those of MPI


def require_hardware(args: TrainingArguments, attn_implementation: str | None = None) -> None:
    """Stop, before anything is loaded, where processes, device, precision or attention cannot be what was asked for.

    Raises:
        UserError: What was asked, what is, and what to do.
    """
    _require_processes(args)
    _require_device(args)
    _require_precision(args)
    _require_attention(attn_implementation)


def _require_processes(args: TrainingArguments) -> None:
    asked = next((int(os.environ[name]) for name in _WORLD_SIZES if name in os.environ), 1)
    if asked != args.world_size:
        raise UserError(
            f"{asked} processes were asked for, but no GPU is to be had, and without one each would train alone and "
            "write the same output_dir. Find out why (nvidia-smi), or take accelerate_configs/cpu_ddp.yaml and "
            "`use_cpu: true` in the recipe"
        )
    # Only accelerate's launcher of a single process sets the first, and the second only if asked for more than one.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and asked == 1:
        raise UserError(
            "several processes were asked for, but accelerate has started one, as it does for distributed_type NO and "
            "MULTI_CPU. Take `distributed_type: MULTI_GPU` (also on the processor: accelerate_configs/cpu_ddp.yaml) "
            "or `num_processes: 1`; if you have set MASTER_ADDR for something else, unset it"
        )


def _require_device(args: TrainingArguments) -> None:
    if args.device.type == "cpu" and not args.use_cpu and os.environ.get("ACCELERATE_USE_CPU") == "False":
        raise UserError(
            "a GPU was asked for (`use_cpu: false` of accelerate), but torch finds none. Find out why (nvidia-smi), "
            "or take accelerate_configs/cpu.yaml"
        )
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if args.device.type == "cuda" and local > gpus:
        raise UserError(f"{local} processes were asked for on {gpus} GPUs: give accelerate --num_processes {gpus}")
    if args.n_gpu > 1:
        more = f"more: `accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes {args.n_gpu}`"
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's config asks for one process on one GPU
            raise UserError(f"one GPU was asked for, but {args.n_gpu} are visible. One: --gpu_ids 0; {more}")
        print(
            f"warning: plain python drives all {args.n_gpu} GPUs by torch's slow DataParallel, each with a batch of "
            f"its own. One GPU: CUDA_VISIBLE_DEVICES=0; {more}"
        )


def _require_precision(args: TrainingArguments) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    recipe = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if asked not in ("no", "fp8", recipe):  # fp8 is no word of the recipes; "no" is also what is set when not asked
        raise UserError(
            f"accelerate's config asks for mixed_precision: {asked}, the recipe for {recipe}: let both say the same "
            "(recipe: `bf16: true`, `fp16: true` or neither)"
        )
    # torch emulates bf16 on older GPUs, slowly and without a word, and calls that supported.
    bf16 = args.mixed_precision == "bf16" and args.device.type == "cuda"
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"bf16 was asked for, but {torch.cuda.get_device_name()} cannot compute in it. Give `fp16: true` and "
            "`bf16: false` in the recipe and `mixed_precision: fp16` to accelerate"
        )


def _require_attention(implementation: str | None) -> None:
    if implementation is None or not implementation.startswith("flash_attention_") or is_kernels_available():
        return  # with the package `kernels`, transformers fetches flash attention from the Hub
    number = implementation.removeprefix("flash_attention_")
    if not getattr(import_utils, f"is_flash_attn_{number}_available", lambda: False)():
        raise UserError(
            f"attn_implementation: {implementation} needs an NVIDIA GPU and its package (requirements-gpu.txt): "
            "install it, or take sdpa"
        )


def require_strategy(trainer: Trainer) -> None:
    """Stop where DeepSpeed, FSDP, mixed precision or Liger kernels were asked for and the trainer has them not.

    Raises:
        UserError: What was asked, what is, and what to do.
    """
    args, accelerator = trainer.args, trainer.accelerator
    deepspeed = args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    for asked, name, remedy in (
        (deepspeed, "DEEPSPEED", "start it with `accelerate launch --config_file accelerate_configs/zero2.yaml`"),
        (fsdp, "FSDP", "it needs GPUs; on the processor take accelerate_configs/cpu_ddp.yaml"),
    ):
        if asked and accelerator.distributed_type.value != name:
            raise UserError(f"{name} was asked for, but this is {accelerator.distributed_type.value}: {remedy}")
    if accelerator.mixed_precision != args.mixed_precision:
        raise UserError(
            f"mixed precision {args.mixed_precision} was asked for, but this is {accelerator.mixed_precision}"
        )
    if args.use_liger_kernel and not _has_liger(trainer.model):
        raise UserError(
            f"use_liger_kernel was asked for, but it has changed nothing in a `{trainer.model.config.model_type}` "
            "model: leave it out"
        )


class HardwareCallback(TrainerCallback):
    """Prints what the run really is, once everything stands, and writes it into the run card.

    Args:
        trainer: Its model, optimizer and accelerator are asked.
        run_card: Receives the entry `hardware`; then `run.json` is written.
    """

    def __init__(self, trainer: Trainer, run_card: dict[str, Any]) -> None:
        self.trainer, self.run_card = trainer, run_card

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        release_extensions()
        self.run_card["hardware"] = hardware = describe_hardware(self.trainer)
        if state.is_world_process_zero:
            print("This run is:\n" + "\n".join(f"  {key:<22} {value}" for key, value in hardware.items()))
            write_run_card(self.trainer, self.run_card)


def describe_hardware(trainer: Trainer) -> dict[str, Any]:
    """What the run is, by what stands in memory, not by what was asked for. Call it when training has begun."""
    args, model, config = trainer.args, trainer.model, trainer.model.config
    length = getattr(trainer.train_dataset, "block_size", None) or getattr(args, "max_length", None)
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    modules = [*trainer.model_wrapped.modules()]
    compiled = any(type(each).__name__ == "OptimizedModule" or each._compiled_call_impl for each in modules)
    kernels = ["torch.compile"] * compiled + ["liger"] * _has_liger(model)
    return {
        "distributed_type": _distributed_type(trainer),
        "processes": args.world_size,
        "machines": args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)),
        "device": _device_name(args.device),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "parameters": ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()})),
        "attention": config._attn_implementation,
        "experts": config._experts_implementation if find_routers(model) else None,
        "kernels": ", ".join(kernels) or None,
        "optimizer": _optimizer_name(trainer.optimizer),
        "gradient_checkpointing": any(getattr(each, "gradient_checkpointing", False) for each in modules),
        "global_batch_rows": rows,
        "global_batch_tokens": rows * length if length else None,
    }


def _distributed_type(trainer: Trainer) -> str:
    name, plugin = trainer.accelerator.distributed_type.value, trainer.accelerator.state.deepspeed_plugin
    stage = f" ZeRO-{plugin.zero_stage}" if plugin else ""
    wrapped = type(trainer.model_wrapped).__name__
    return f"{name}{stage} ({wrapped})"


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def _optimizer_name(optimizer: Any) -> str:
    """The innermost optimizer: those of accelerate and DeepSpeed hold another."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__ + (" (fused)" if optimizer.defaults.get("fused") else "")


def _has_liger(model: torch.nn.Module) -> bool:
    """Liger gives modules functions of its own: `forward`, a loss, a rotation."""
    own = (value for module in model.modules() for value in vars(module).values() if callable(value))
    return any("liger" in str(getattr(value, "__module__", "")) for value in own)
