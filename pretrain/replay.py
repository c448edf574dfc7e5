"""Replay one step of a run, for example after a loss spike: show its rows, their origin and their losses.

    python pretrain/pretrain.py --config CONFIG_OF_THE_RUN --replay_step 1234

rebuilds the batch of the step and runs it through the newest checkpoint before the step. Nothing on disk changes. It
runs in one process, however many the run had.
"""

import json
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.trainer_utils import sort_checkpoints

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.trace import describe_blocks
from buddygpt.pretrain.stream_trainer import PretrainTrainer
from buddygpt.training.resume import find_damage

WORST_ROWS = 3
SHOWN_CHARACTERS = 400


def replay_step(trainer: PretrainTrainer, step: int) -> None:
    """Print the loss and origin of every row of a step, the gradient norm, and the text of the worst rows.

    Args:
        trainer: The trainer of the run, with the model as it was before the first step.
        step: As logged, so the first step is 1.

    Raises:
        UserError: There is no run, it has no such step, or there are several processes.
    """
    card = Path(trainer.args.output_dir) / "run.json"
    if not card.is_file():
        raise UserError(f"replay_step: {card.parent} holds no run.json; use the run's own config and output_dir")
    if trainer.args.world_size > 1:
        raise UserError("replay_step takes one process: start it with plain python")
    if not 1 <= step <= trainer.args.max_steps:
        raise UserError(f"replay_step is {step}, the run's steps are 1 to {trainer.args.max_steps}")

    # Run every row alone; the gradients add up to those of the step.
    weights = load_weights_before(trainer, step)
    global_batch = json.loads(card.read_text(encoding="utf-8"))["origin"]["global_batch"]
    blocks = trainer.train_dataset.blocks
    indices = trainer.train_dataset.order.which_blocks(step, global_batch)
    losses = [measure_row(trainer, blocks[index], len(indices)) for index in tqdm(indices, desc=f"step {step}")]
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    gradient_norm = torch.nn.utils.get_total_norm(gradients).item()
    mean_loss = sum(losses) / len(losses)
    print(f"step {step} on the weights after step {weights}: loss {mean_loss:.4f}, gradient norm {gradient_norm:.4f}")

    # The worst rows first: NaN, then the highest loss.
    ranked = sorted(zip(losses, indices, strict=True), key=lambda row: (not math.isnan(row[0]), -row[0]))
    for loss, index in ranked:
        print(f"loss {loss:.4f}  {describe_blocks(blocks, [index])}")
    for loss, index in ranked[:WORST_ROWS]:
        text = trainer.processing_class.decode(blocks[index]["input_ids"])
        print(f"\nblock {index}, loss {loss:.4f}: {text[:SHOWN_CHARACTERS]!r}")


def load_weights_before(trainer: PretrainTrainer, step: int) -> int:
    """Load the newest undamaged checkpoint before a step; return its step, or 0 if there is none."""
    for folder in map(Path, reversed(sort_checkpoints(trainer.args.output_dir))):
        checkpoint_step = int(folder.name.rsplit("-", 1)[1])
        if checkpoint_step < step and find_damage(folder) is None:
            trainer._load_from_checkpoint(str(folder))
            return checkpoint_step
    return 0


def measure_row(trainer: PretrainTrainer, row: dict[str, torch.Tensor], rows: int) -> float:
    """Return the mean loss of one row, and add its part of the step's gradient.

    Args:
        trainer: The trainer, with the weights to use.
        row: A block: tensors of shape (T,).
        rows: Rows in the step.
    """
    trainer.model.train()
    batch = {key: value.unsqueeze(0) for key, value in row.items()}
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    (loss / rows).backward()
    return loss.item()
