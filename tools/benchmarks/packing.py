"""Packing of chats: how much of a batch is real, and real tokens a CPU second, in TRL's `SFTTrainer`.

    python tools/benchmarks/packing.py           # about 2 minutes on two cores
    python tools/benchmarks/packing.py --quick   # seconds: does it run?

Lengths are drawn from a log-normal distribution, as chats' are. Attention inside documents is exact in each case; on a
processor a packed row pays for a mask as wide as the row, which a GPU's varlen kernels do not need.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ab import Report, alternate, ratios, spread
from datasets import Dataset
from random_shards import make_tokenizer
from tqdm import tqdm
from training_step import shapes
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script


@dataclass
class PackingArguments:
    rounds: int = field(default=3, metadata={"help": "Times each variant is measured."})
    chats: int = field(default=96, metadata={"help": "Chats of an epoch."})
    rows: int = field(default=8, metadata={"help": "Rows of a batch; packed ones of the same greatest length."})
    length: int = field(default=256, metadata={"help": "Greatest length, in tokens."})
    quick: bool = field(default=False, metadata={"help": "One round of a few short chats; nothing is written."})


WAYS = {
    "padding": {},
    "padding, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "packing (bfd)": {"packing": True, "packing_strategy": "bfd"},
}


def make_chats(args: PackingArguments, vocab_size: int) -> Dataset:
    """Rows of random ids, median length a fifth of the greatest."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(args.length / 5), 0.9, args.chats)).clip(4, args.length).astype(int)
    return Dataset.from_dict({"input_ids": [random.integers(3, vocab_size, size).tolist() for size in lengths]})


class Epoch:
    """Trains an epoch one way, and says how many real tokens a CPU second that was; `utilisation` is its share."""

    def __init__(self, make_trainer: Callable[[], SFTTrainer], real_tokens: int) -> None:
        self.make_trainer, self.real_tokens = make_trainer, real_tokens
        self.utilisation = real_tokens / sum(
            batch["input_ids"].numel() for batch in make_trainer().get_train_dataloader()
        )

    def __call__(self) -> float:
        trainer = self.make_trainer()
        start = time.process_time()
        trainer.train()
        return self.real_tokens / (time.process_time() - start)


def main() -> None:
    (args,) = parse_arguments(PackingArguments, description=__doc__)
    if args.quick:
        args.rounds, args.chats, args.rows, args.length = 1, 8, 4, 64
    config = shapes(args.quick)["BuddyGPT"]
    chats = make_chats(args, config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder) / "tokenizer", config.vocab_size)

        def trainer(options: dict) -> SFTTrainer:
            settings = SFTConfig(
                folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=args.length,
                num_train_epochs=1, save_strategy="no", disable_tqdm=True, logging_strategy="no",
                per_device_train_batch_size=1 + args.rows // 4 if options.get("packing") else args.rows, **options,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config)
            return SFTTrainer(model, settings, train_dataset=chats, processing_class=tokenizer)

        real = sum(map(len, chats["input_ids"]))
        variants = {name: Epoch(lambda options=options: trainer(options), real) for name, options in WAYS.items()}
        with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
            samples = alternate(variants, args.rounds, progress)
    report = Report("packing", ["way", "share of real tokens", "real tokens a CPU second", "ratio to the first"])
    for name, values in samples.items():
        share, by_round = variants[name].utilisation, ratios(values, samples["padding"])
        report.add([name, f"{share:.1%}", spread(values), spread(by_round)], name=name, share=share, values=values)
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
