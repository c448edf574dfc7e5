"""Make `use_liger_kernel: true` work for BuddyGPT models, or refuse it; transformers would ignore it."""

from importlib.util import find_spec

from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from buddygpt.cli.errors import UserError
from buddygpt.model.liger_kernels import SWITCHES, register


def register_liger(args: TrainingArguments) -> None:
    """Register BuddyGPT with Liger if `args.use_liger_kernel` is set. Call it before a `Trainer` is made.

    Raises:
        UserError: Liger's kernels cannot run here, or `liger_kernel_config` names an unknown one.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available() or find_spec("triton") is None:
        raise UserError("use_liger_kernel: true needs liger-kernel and triton: pip install -r requirements-gpu.txt")
    if args.device.type != "cuda":
        raise UserError(f"use_liger_kernel: true needs a GPU, this run is on {args.device.type}: remove it")
    for name in args.liger_kernel_config or {}:
        if name not in SWITCHES:
            raise UserError(f"liger_kernel_config has no {name}; it has {', '.join(SWITCHES)}")
    register()
