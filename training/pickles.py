"""Load the pickles of a checkpoint without running code that they contain."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from buddygpt.cli.errors import UserError

LOADERS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state")


def load_without_code(trainer: Trainer) -> None:
    """Make every `torch.load` of this process refuse pickles of unknown classes, and report failures in one line.

    transformers loads its own files that way; DeepSpeed and torch's distributed checkpoints do not.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if trainer.is_deepspeed_enabled:
        _allow_deepspeed()
    for name in LOADERS:
        setattr(trainer, name, _reporting(getattr(trainer, name)))


def _allow_deepspeed() -> None:
    """Allow the classes that DeepSpeed saves besides tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def _reporting(load: Any) -> Any:
    @wraps(load)
    def reporting_load(checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        with reporting_damage(checkpoint):
            return load(checkpoint, *args, **kwargs)

    return reporting_load


@contextmanager
def reporting_damage(checkpoint: str | None) -> Iterator[None]:
    """Turn any error of loading a checkpoint into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        if isinstance(error, pickle.UnpicklingError):
            reason = "a file in it holds other objects than tensors, and may run code"
        else:
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        raise UserError(
            f"cannot load {checkpoint}: {reason}. Delete this checkpoint to resume from the one before it"
        ) from error


def require_plain_metadata(checkpoint: Path) -> None:
    """Raise UserError if a `.metadata` file of FSDP's checkpoints names other objects than torch writes.

    torch reads these files with plain `pickle`.
    """
    for file in checkpoint.rglob(".metadata"):
        with reporting_damage(str(checkpoint)), open(file, "rb") as stream:
            MetadataUnpickler(stream).load()


class MetadataUnpickler(pickle.Unpickler):
    """Loads only classes of torch's checkpoint metadata and the few values they hold."""

    def find_class(self, module: str, name: str) -> Any:
        is_metadata = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        is_value = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = (module, name) in {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("collections", "OrderedDict"),
        }
        if "." not in name and (known or is_value or is_metadata):
            found = super().find_class(module, name)
            if known or is_value or (isinstance(found, type) and found.__module__ == module):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
