"""Check that a run gets the hardware and precision it requested; print and record what it got.

accelerate falls back silently: to one process, to several processes that train separately and overwrite each other's
output, from FSDP or DeepSpeed to DDP, from GPU to CPU. The request is read from the arguments and from the environment
variables that `accelerate launch` and torchrun set (accelerate/utils/launch.py). The result is read from the
`Accelerator` and from the model that it has wrapped.
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

# The number of processes, as set by torchrun and accelerate, and by several versions of MPI.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


# --- before anything is loaded ---


def require_hardware(args: TrainingArguments, attn_implementation: str | None = None) -> None:
    """Raise if processes, device, precision or attention cannot be what was requested. Call it before loading data.

    Raises:
        UserError: The request, the reality, and what to do.
    """
    _require_processes(args)
    _require_device(args)
    _require_precision(args)
    _require_attention(attn_implementation)


def _require_processes(args: TrainingArguments) -> None:
    requested = 1
    for name in _WORLD_SIZES:
        if name in os.environ:
            requested = int(os.environ[name])
            break
    if requested != args.world_size:
        raise UserError(
            f"{requested} processes were requested, but no GPU was found; each process would train separately and "
            "overwrite output_dir. Check nvidia-smi, or use accelerate_configs/cpu_ddp.yaml with `use_cpu: true` in "
            "the recipe"
        )
    # Only accelerate's launcher for a single process sets ACCELERATE_USE_CPU here, and it sets MASTER_ADDR only if
    # more than one process was requested.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and requested == 1:
        raise UserError(
            "several processes were requested, but accelerate has started one: it does so if distributed_type is NO "
            "or MULTI_CPU. Use `distributed_type: MULTI_GPU` (also on CPUs: accelerate_configs/cpu_ddp.yaml) or "
            "`num_processes: 1`; if MASTER_ADDR is set for another purpose, unset it"
        )


def _require_device(args: TrainingArguments) -> None:
    if args.device.type == "cpu" and not args.use_cpu and os.environ.get("ACCELERATE_USE_CPU") == "False":
        raise UserError(
            "a GPU was requested (`use_cpu: false` in accelerate's config), but torch finds none. Check nvidia-smi, "
            "or use accelerate_configs/cpu.yaml"
        )
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if args.device.type == "cuda" and local_processes > gpus:
        raise UserError(
            f"{local_processes} processes were requested on {gpus} GPUs: start accelerate with --num_processes {gpus}"
        )
    if args.n_gpu > 1:  # one process drives several GPUs
        use_all = f"accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes {args.n_gpu}"
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate has started it, for one GPU
            raise UserError(
                f"one GPU was requested, but {args.n_gpu} are visible. To use one: --gpu_ids 0; to use all: {use_all}"
            )
        print(
            f"warning: plain python uses all {args.n_gpu} GPUs through torch's slow DataParallel, and gives each a "
            f"full batch. To use one: CUDA_VISIBLE_DEVICES=0; to use all: {use_all}"
        )


def _require_precision(args: TrainingArguments) -> None:
    recipe = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    # accelerate also sets "no" if its config says nothing. Recipes have no key for fp8.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", "fp8", recipe):
        raise UserError(
            f"accelerate's config requests mixed_precision: {launcher}, the recipe {recipe}: make them agree (recipe: "
            "`bf16: true`, `fp16: true` or neither)"
        )
    # On older GPUs torch emulates bf16, slowly and silently, and reports it as supported.
    bf16_on_gpu = args.mixed_precision == "bf16" and args.device.type == "cuda"
    if bf16_on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"bf16 was requested, but {torch.cuda.get_device_name()} has no bf16 hardware. Set `fp16: true` and "
            "`bf16: false` in the recipe and `mixed_precision: fp16` in accelerate's config"
        )


def _require_attention(implementation: str | None) -> None:
    if implementation is None or not implementation.startswith("flash_attention_"):
        return
    if is_kernels_available():  # with the package `kernels`, transformers downloads flash attention from the Hub
        return
    number = implementation.removeprefix("flash_attention_")
    is_available = getattr(import_utils, f"is_flash_attn_{number}_available", None)
    if is_available is None or not is_available():
        raise UserError(
            f"attn_implementation: {implementation} needs an NVIDIA GPU and its package (requirements-gpu.txt): "
            "install it, or use sdpa"
        )


# --- once the trainer exists ---


def require_strategy(trainer: Trainer) -> None:
    """Raise if DeepSpeed, FSDP, mixed precision or Liger was requested but is not active.

    Raises:
        UserError: The request, the reality, and what to do.
    """
    args, accelerator = trainer.args, trainer.accelerator
    actual = accelerator.distributed_type.value
    if (args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true") and actual != "DEEPSPEED":
        raise UserError(
            f"DEEPSPEED was requested, but this is {actual}: start it with `accelerate launch --config_file "
            "accelerate_configs/zero2.yaml`"
        )
    if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true") and actual != "FSDP":
        raise UserError(
            f"FSDP was requested, but this is {actual}: it needs GPUs; on CPUs use accelerate_configs/cpu_ddp.yaml"
        )
    if accelerator.mixed_precision != args.mixed_precision:
        raise UserError(
            f"mixed precision {args.mixed_precision} was requested, but this is {accelerator.mixed_precision}: make "
            "accelerate's config and the recipe agree"
        )
    if args.use_liger_kernel and not _has_liger(trainer.model):
        kind = trainer.model.config.model_type
        raise UserError(f"use_liger_kernel was requested, but has no effect on a `{kind}` model: remove it")


class HardwareCallback(TrainerCallback):
    """Prints the hardware and precision of a run when training begins, and adds them to the run card.

    Args:
        trainer: Its model, optimizer and accelerator are inspected.
        run_card: Receives the entry `hardware`; then `run.json` is written.
    """

    def __init__(self, trainer: Trainer, run_card: dict[str, Any]) -> None:
        self.trainer = trainer
        self.run_card = run_card

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        release_extensions()  # the model is wrapped by now, so DeepSpeed has compiled everything
        hardware = describe_hardware(self.trainer)
        self.run_card["hardware"] = hardware
        if state.is_world_process_zero:
            print("This run is:")
            for key, value in hardware.items():
                print(f"  {key:<22} {value}")
            write_run_card(self.trainer, self.run_card)


def describe_hardware(trainer: Trainer) -> dict[str, Any]:
    """Return what the run uses, read from the objects in memory. Call it when training has begun."""
    args, model, config = trainer.args, trainer.model, trainer.model.config
    modules = list(trainer.model_wrapped.modules())
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    row_length = getattr(trainer.train_dataset, "block_size", None) or getattr(args, "max_length", None)
    return {
        "distributed_type": _distributed_type(trainer),
        "processes": args.world_size,
        "machines": args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)),
        "device": _device_name(args.device),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "parameters": ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()})),
        "attention": config._attn_implementation,
        "experts": config._experts_implementation if find_routers(model) else None,
        "kernels": _kernels(model, modules),
        "optimizer": _optimizer_name(trainer.optimizer),
        "gradient_checkpointing": any(getattr(each, "gradient_checkpointing", False) for each in modules),
        "global_batch_rows": rows,
        "global_batch_tokens": rows * row_length if row_length else None,
    }


def _distributed_type(trainer: Trainer) -> str:
    """Return the type with the class that wraps the model: "DEEPSPEED ZeRO-2 (DeepSpeedEngine)"."""
    name = trainer.accelerator.distributed_type.value
    plugin = trainer.accelerator.state.deepspeed_plugin
    stage = f" ZeRO-{plugin.zero_stage}" if plugin else ""
    return f"{name}{stage} ({type(trainer.model_wrapped).__name__})"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _kernels(model: torch.nn.Module, modules: list[torch.nn.Module]) -> str | None:
    kernels = []
    # torch.compile either wraps a module or leaves the compiled call in it.
    if any(type(each).__name__ == "OptimizedModule" or each._compiled_call_impl for each in modules):
        kernels.append("torch.compile")
    if _has_liger(model):
        kernels.append("liger")
    return ", ".join(kernels) or None


def _optimizer_name(optimizer: Any) -> str:
    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap the optimizer, possibly several times
        optimizer = optimizer.optimizer
    fused = " (fused)" if optimizer.defaults.get("fused") else ""
    return type(optimizer).__name__ + fused


def _has_liger(model: torch.nn.Module) -> bool:
    """Return True if Liger has patched the model: it stores its functions as attributes of single modules."""
    for module in model.modules():
        for value in vars(module).values():
            if callable(value) and "liger" in str(getattr(value, "__module__", "")):
                return True
    return False
