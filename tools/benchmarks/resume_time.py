"""Does it cost the same to resume a run at its beginning and at its end?

    python tools/benchmarks/resume_time.py           # 50 million tokens, a minute
    python tools/benchmarks/resume_time.py --quick

CPU seconds from nothing to the first batch: open the shards, check and load the checkpoint, make the trainer, find the
data. Beside it the same with stock `Trainer`, which shuffles all blocks and skips what was read. Checkpoints of later
steps are copies of one whose step was set.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ab import Report, alternate, cpu_seconds
from random_shards import make_shards
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, logging

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.data.shards.blocks import BlockDataset, BlockStream
from buddygpt.data.shards.history import make_order, update_history
from buddygpt.model.presets import load_config
from buddygpt.pretrain.stream_trainer import StreamTrainer
from buddygpt.training.resume import find_start, save_checkpoints_atomically, write_checksums

PROGRESS = {"1%": 0.01, "50%": 0.5, "99%": 0.99}


@dataclass
class ResumeTimeArguments:
    tokens: int = field(default=50_000_000, metadata={"help": "Size of the random shard; one epoch is the run."})
    block_size: int = field(default=64, metadata={"help": "Tokens in a row."})
    rounds: int = field(default=7, metadata={"help": "Times each is measured."})
    quick: bool = field(default=False, metadata={"help": "Two rounds of a tenth; nothing is written."})


class FirstBatch(Exception):
    """The run has its first batch and could go on."""


def make_trainer(folder: Path, block_size: int, stream: bool, **options: Any) -> Trainer:
    """A trainer of a tiny model on one epoch of the shard, one block a step."""
    blocks = BlockDataset(folder / "shards", block_size)
    args = TrainingArguments(
        str(folder / "run"), use_cpu=True, per_device_train_batch_size=1, disable_tqdm=True, **options
    )
    data = blocks
    if stream:
        data = BlockStream(blocks, make_order(update_history([], blocks, 0, 1), blocks, args.seed), len(blocks))
    model = AutoModelForCausalLM.from_config(load_config("debug"))
    return (StreamTrainer if stream else Trainer)(model=model, args=args, train_dataset=data)


def write_checkpoints(folder: Path, block_size: int, blocks: int) -> dict[str, Path]:
    """A checkpoint for each share of the run."""
    trainer = make_trainer(folder, block_size, stream=True, max_steps=1, save_steps=1)
    save_checkpoints_atomically(trainer)
    trainer.train()
    checkpoints = {}
    for name, share in PROGRESS.items():
        step = int(share * blocks)
        checkpoints[name] = folder / "steps" / f"checkpoint-{step}"
        shutil.copytree(folder / "run" / "checkpoint-1", checkpoints[name])
        state = json.loads((checkpoints[name] / "trainer_state.json").read_text())
        (checkpoints[name] / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
        write_checksums(checkpoints[name])
    return checkpoints


def resume(folder: Path, block_size: int, stream: bool, checkpoint: Path) -> None:
    """Go on from the checkpoint, up to the first batch; it is the one that is due."""
    blocks = BlockDataset(folder / "shards", block_size)
    options = {"max_steps": len(blocks), "resume_from_checkpoint": str(checkpoint)}
    trainer = make_trainer(folder, block_size, stream, **options)
    start = find_start(trainer.args, trainer.model)

    def stop(model, inputs, num_items_in_batch=None):
        if stream:
            (index,) = trainer.train_dataset.order.which_blocks(start.step + 1, 1)
            assert inputs["input_ids"][0].equal(blocks[index]["input_ids"])
        raise FirstBatch

    trainer.training_step = stop
    try:
        trainer.train(resume_from_checkpoint=start.checkpoint)
    except FirstBatch:
        return
    raise AssertionError("training has ended without a batch")


def main() -> None:
    (args,) = parse_arguments(ResumeTimeArguments, description=__doc__)
    logging.set_verbosity_error()
    rounds, tokens = (2, args.tokens // 10) if args.quick else (args.rounds, args.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_shards(folder, tokens, vocab_size=512)
        checkpoints = write_checkpoints(folder, args.block_size, tokens // args.block_size)
        variants = {
            f"{trainer}, at {share}": partial(
                cpu_seconds, partial(resume, folder, args.block_size, trainer == "buddygpt", path)
            )
            for trainer in ("buddygpt", "stock Trainer")
            for share, path in checkpoints.items()
        }
        with tqdm(total=(rounds + 1) * len(variants), unit="resume") as progress:
            samples = alternate(variants, rounds, progress)
    report = Report("resume_time", ["resumed", "CPU seconds to the first batch", "ratio"])
    report.add_samples(samples, unit="CPU seconds")
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
