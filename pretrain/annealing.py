"""A decay as its own stage: the share of the run it takes, and the optimizer state it starts from."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from buddygpt.cli.errors import UserError
from buddygpt.training.pickles import reporting_damage


def count_decay_steps(args: TrainingArguments) -> None:
    """Replace a `num_decay_steps` below 1 in `lr_scheduler_kwargs` by that share of `max_steps`.

    `warmup_steps` below 1 means a share in the same way, see transformers.
    """
    schedule = args.lr_scheduler_kwargs or {}
    share = schedule.get("num_decay_steps")
    if isinstance(share, float) and 0 < share < 1:
        schedule["num_decay_steps"] = round(share * args.max_steps)


def start_with_optimizer_state(trainer: Trainer, checkpoint: str | None) -> None:
    """Let a new run start with the optimizer state of a checkpoint: momentum and second moments, no learning rates.

    Raises:
        UserError: There is no checkpoint with such a state, or the trainer splits its own into parts.
    """
    if checkpoint is None:
        raise UserError("keep_optimizer takes the state of model_name_or_path: name a checkpoint of another run there")
    file = Path(checkpoint) / OPTIMIZER_NAME
    if not file.is_file():
        raise UserError(
            f"keep_optimizer: {checkpoint} has no {OPTIMIZER_NAME}. Name one of the checkpoint-N folders of the run "
            "(without save_only_model, ZeRO or FSDP), or remove the option"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UserError(
            "keep_optimizer: ZeRO and FSDP split the state; use accelerate_configs/ddp.yaml or one process"
        )
    trainer.add_callback(OptimizerStateCallback(file))


class OptimizerStateCallback(TrainerCallback):
    """Loads the state of every parameter when a new run begins. A resumed run has its own."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step:
            return
        with reporting_damage(str(self.file)):
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
        own = optimizer.state_dict()
        if _layout(saved) != _layout(own):
            raise UserError(f"keep_optimizer: {self.file} is of another optimizer; set the one of that run")
        optimizer.load_state_dict({**own, "state": saved["state"]})


def _layout(state_dict: dict[str, Any]) -> list[Any]:
    """Return the parameters of each group, with the names of its settings, which differ between optimizers."""
    return [(group["params"], sorted(group)) for group in state_dict["param_groups"]]
