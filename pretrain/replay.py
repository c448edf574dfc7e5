"""Look at one step of a run again, after a spike say: which rows it read, where they come from, what their losses are.

    python pretrain/pretrain.py --config CONFIG_OF_THE_RUN --replay-step 1234

rebuilds the step's batch and runs it through the newest checkpoint before the step. Nothing on disk changes. It takes
one process, whatever the run had.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.trainer_utils import sort_checkpoints

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.trace import describe_blocks
from buddygpt.training.resume import find_damage

WORST_ROWS = 3
SHOWN_CHARACTERS = 400


def replay_step(trainer, step: int) -> None:
    """Print the loss and origin of every row of a step, the gradient norm, and the text of the worst rows.

    Args:
        trainer: A `PretrainTrainer` as the run has it, with the model as it was before the first step.
        step: As it is logged: 1 is the first.

    Raises:
        UserError: There is no run, or it has no such step, or this is one of several processes.
    """
    card = Path(trainer.args.output_dir) / "run.json"
    if not card.is_file():
        raise UserError(f"replay_step: {card.parent} holds no run.json; give the run's own config or --output_dir")
    if trainer.args.world_size > 1:
        raise UserError("replay_step takes one process: start it with plain python")
    if not 1 <= step <= trainer.args.max_steps:
        raise UserError(f"replay_step is {step}, the run's steps are 1 to {trainer.args.max_steps}")
    weights = load_weights_before(trainer, step)
    global_batch = json.loads(card.read_text(encoding="utf-8"))["origin"]["global_batch"]
    blocks, order = trainer.train_dataset.blocks, trainer.train_dataset.order
    indices = order.which_blocks(step, global_batch)
    losses = [measure_row(trainer, blocks[index], len(indices)) for index in tqdm(indices, desc=f"step {step}")]
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    print(f"step {step} on the weights after step {weights}: loss {sum(losses) / len(losses):.4f}, ", end="")
    print(f"gradient norm {torch.nn.utils.get_total_norm(gradients).item():.4f}")
    ranked = sorted(zip(losses, indices, strict=True), key=lambda row: (row[0] == row[0], -row[0]))  # NaN first
    for loss, index in ranked:
        print(f"loss {loss:.4f}  {describe_blocks(blocks, [index])}")
    for loss, index in ranked[:WORST_ROWS]:
        text = trainer.processing_class.decode(blocks[index]["input_ids"])
        print(f"\nblock {index}, loss {loss:.4f}: {text[:SHOWN_CHARACTERS]!r}")


def load_weights_before(trainer, step: int) -> int:
    """Put the newest weights before the step into the model; return how many steps they have seen."""
    for folder in map(Path, reversed(sort_checkpoints(trainer.args.output_dir))):
        seen = int(folder.name.rsplit("-", 1)[1])
        if seen < step and find_damage(folder) is None:
            trainer._load_from_checkpoint(str(folder))
            return seen
    return 0


def measure_row(trainer, row: dict[str, torch.Tensor], rows: int) -> float:
    """Return the mean loss of one row and add its share of the step's gradient."""
    inputs = trainer._prepare_inputs({key: value.unsqueeze(0) for key, value in row.items()})
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model.train(), inputs)
    (loss / rows).backward()
    return loss.item()
