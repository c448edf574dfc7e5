"""Models under DeepSpeed ZeRO-3, where each process holds a share of every weight."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def zero3_off(args: TrainingArguments) -> Iterator[None]:
    """Create models whole on this process: under ZeRO-3, transformers divides them among all processes.

    It cannot divide models without weights (on the meta device): "Cannot copy out of meta tensor".
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def number_of_parameters(model: nn.Module) -> int:
    """Return what `num_parameters` of transformers does, but of all processes: the shares themselves look empty."""
    shares = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_numel")]
    return sum(parameter.ds_numel for parameter in shares) if shares else model.num_parameters()
