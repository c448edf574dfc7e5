"""Check that a checkpoint has every weight of its model, and that each is a number."""

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def require_all_weights(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Compare the tensors of a checkpoint with those of the model that config.json describes, without loading them.

    transformers fills what is missing with random numbers, and ignores layers that the model does not have.

    Raises:
        UserError: A tensor is missing, has another shape or belongs to no layer, or a file cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = require_causal_lm(name_or_path, trust_remote_code)
    if getattr(config, "quantization_config", None):  # cannot be created without its device
        return
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # instead of a table of many lines
    logging.disable_progress_bar()
    try:
        _, found = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            trust_remote_code=trust_remote_code,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except UnpicklingError as error:  # its text advises to load the file with `weights_only=False`
        raise UserError(
            f"{name_or_path}: a weight file holds other objects than tensors, and may run code. Use safetensors"
        ) from error
    except Exception as error:  # transformers and safetensors raise many kinds for damaged files
        raise UserError(f"cannot read the weights of {name_or_path}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()

    mismatched = {str(name) for name, *_ in found["mismatched_keys"]}
    extra_layers = {name for name in found["unexpected_keys"] if ".layers." in name}
    for problem, names in {
        "lacks": set(found["missing_keys"]) - mismatched,
        "has another shape of": mismatched,
        "has a layer too many for its config.json:": extra_layers,
    }.items():
        if names:
            first, count = min(names), len(names)
            more = f" and {count - 1} more tensors" if count > 1 else ""
            raise UserError(f"{name_or_path} {problem} {first}{more}; copy the whole checkpoint again")


def require_finite_weights(model: "nn.Module", name_or_path: str | Path) -> None:
    """Raise UserError if a weight of a loaded model is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        is_number = tensor.is_floating_point() and tensor.element_size() > 1  # torch cannot ask 8-bit floats
        if is_number and not tensor.isfinite().all():
            raise UserError(f"{name_or_path} has NaN or infinite weights in {name}; use an earlier checkpoint")
