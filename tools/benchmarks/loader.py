"""Speed of the loader and of resuming, with token shards of random tokens.

    python tools/benchmarks/loader.py           # two minutes
    python tools/benchmarks/loader.py --quick   # checks in seconds that it runs

Reading compares blocks from shards with the table that `datasets.map` and `group_texts` write: equal blocks in an
Arrow file, shuffled by the sampler, as in transformers' run_clm.py. It takes wall time, because workers are processes:
run it on an idle machine. Resuming takes the CPU seconds from nothing to the first batch (open the shards, check and
load the checkpoint, make the trainer, find the data), and compares with stock `Trainer`, which skips batches that were
read. Checkpoints of later steps are copies of one with another step in its state.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ab import Report, alternate, cpu_seconds, spread
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    logging,
)

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.data.shards.blocks import BlockDataset, BlockStream
from buddygpt.data.shards.format import FORMAT_VERSION, MANIFEST, documents_file, hash_shard, tokenizer_fingerprint
from buddygpt.data.shards.history import make_order, update_history
from buddygpt.model.presets import load_config
from buddygpt.pretrain.stream_trainer import StreamTrainer
from buddygpt.training.resume import find_start
from buddygpt.training.saving import save_checkpoints_atomically, write_checksums

PROGRESS = {"1%": 0.01, "50%": 0.5, "99%": 0.99}


@dataclass
class LoaderArguments:
    rounds: int = field(default=5, metadata={"help": "Measurements of each variant."})
    tokens: int = field(default=20_000_000, metadata={"help": "Tokens on disk for reading."})
    batches: int = field(default=200, metadata={"help": "Batches read in one measurement."})
    rows: int = field(default=16, metadata={"help": "Rows of a batch."})
    length: int = field(default=1024, metadata={"help": "Tokens in a row."})
    resume_tokens: int = field(default=50_000_000, metadata={"help": "Tokens of a run that is resumed, one epoch."})
    resume_length: int = field(default=64, metadata={"help": "Tokens in a row of that run."})
    quick: bool = field(default=False, metadata={"help": "One round of little data; nothing is written."})


# Random shards ------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Save a tokenizer of `vocab_size` words in `folder` and return it. Id 0 ends a text, id 1 is padding."""
    words = {f"w{number}": number for number in range(vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w1", unk_token="w2")
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_shards(folder: Path, tokens: int, vocab_size: int, document: int = 200) -> Path:
    """Write `tokens` random tokens to `folder/shards`, in documents of `document` tokens, and `folder/tokenizer`.

    Returns:
        The folder of the shards.
    """
    tokenizer, shards = make_tokenizer(folder / "tokenizer", vocab_size), folder / "shards"
    shards.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(3, vocab_size, tokens)
    ends = np.arange(document, tokens + 1, document, dtype="<u8")
    ids[ends.astype(int) - 1] = 0
    dtype = "uint16" if vocab_size < 2**16 else "uint32"
    ids.astype(f"<{dtype[0]}{2 if dtype == 'uint16' else 4}").tofile(shards / "random.ds")
    ends.tofile(shards / "random.ds.index")
    sizes = {"tokens": tokens, "documents": len(ends), "text_bytes": 4 * tokens}
    rows = {"id": [f"random:{number}" for number in range(len(ends))], "chars": [4 * document] * len(ends)}
    pq.write_table(pa.table(rows), shards / documents_file({"file": "random.ds"}))
    shard = {"file": "random.ds", "source": "random", **sizes, **hash_shard(shards, "random.ds")}
    source = {"name": "random", "language": None, **sizes, "epochs": 1.0, "share": 1.0}
    manifest = {"format_version": FORMAT_VERSION, "dtype": dtype, "eos_id": 0, "shards": [shard], "sources": [source]}
    manifest["generations"] = [{"shards": [shard["file"]]}]
    manifest |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_sha256": tokenizer_fingerprint(tokenizer), **sizes}
    (shards / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return shards


# Reading ------------------------------------------------------------------------------------------


def write_arrow(shards: Path, folder: Path, length: int) -> Path:
    """Write the same tokens as `group_texts` does: lists of `length` ids and as many labels."""
    tokens = np.fromfile(shards / "random.ds", "<u2").astype(np.int64)
    blocks = tokens[: len(tokens) // length * length].reshape(-1, length)
    Dataset.from_dict({"input_ids": blocks, "labels": blocks}).save_to_disk(folder)
    return folder


class Reading:
    """Opens a dataset, reads some batches and returns the speed.

    Args:
        open_data: Returns a dataset of rows. Opening it is part of the time of the first batch.
        args: Amount to read.
        workers: Processes of the loader.
        shuffle: Shuffle in the sampler. A stream is shuffled already.
    """

    def __init__(self, open_data: Callable, args: LoaderArguments, workers: int, shuffle: bool) -> None:
        self.open_data, self.args, self.workers, self.shuffle = open_data, args, workers, shuffle
        self.first: list[float] = []

    def __call__(self) -> float:
        """Return tokens per second after the first batch, whose seconds are added to `first`."""
        start = time.perf_counter()
        loader = DataLoader(
            self.open_data(), self.args.rows, self.shuffle, num_workers=self.workers, collate_fn=default_data_collator
        )
        batches = iter(loader)
        next(batches)
        self.first.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(self.args.batches - 1):
            next(batches)
        return (self.args.batches - 1) * self.args.rows * self.args.length / (time.perf_counter() - start)


def measure_reading(args: LoaderArguments) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder, args.tokens, vocab_size=6400)
        arrow = write_arrow(shards, folder / "arrow", args.length)

        def stream() -> BlockStream:
            blocks = BlockDataset(shards, args.length)
            order = make_order(update_history([], blocks, 0, args.rows), blocks, seed=0)
            return BlockStream(blocks, order, args.batches * args.rows)

        variants = {
            "shards, 0 workers": Reading(stream, args, 0, shuffle=False),
            "shards, 2 workers": Reading(stream, args, 2, shuffle=False),
            "group_texts cache, 0 workers": Reading(lambda: load_from_disk(arrow), args, 0, shuffle=True),
            "group_texts cache, 2 workers": Reading(lambda: load_from_disk(arrow), args, 2, shuffle=True),
        }
        with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
            samples = alternate(variants, args.rounds, progress)
        size = {"shards": (shards / "random.ds").stat().st_size}
        size["group_texts cache"] = sum(path.stat().st_size for path in arrow.glob("*.arrow"))
    report = Report("loader", ["variant", "million tokens a second", "first batch after, s", "bytes a token on disk"])
    for variant, values in samples.items():
        first, on_disk = variants[variant].first[1:], size[variant.split(",")[0]] / args.tokens
        cells = [variant, spread([value / 1e6 for value in values]), spread(first), f"{on_disk:.1f}"]
        report.add(cells, name=variant, tokens_per_second=median(values), first_batch_s=first, bytes_per_token=on_disk)
    report.finish(args)


# Resuming ------------------------------------------------------------------------------------------


class FirstBatch(Exception):
    """Raised to stop a run at its first batch."""


def make_trainer(folder: Path, block_size: int, stream: bool, **options: Any) -> Trainer:
    """Return a trainer of a tiny model for one epoch of the shard, with one block per step."""
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
    """Write a checkpoint for each share of the run."""
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
    """Resume from the checkpoint up to the first batch, and check that it is the right one."""
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
    raise AssertionError("training ended without a batch")


def measure_resuming(args: LoaderArguments) -> None:
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder, args.resume_tokens, vocab_size=512)
        checkpoints = write_checkpoints(folder, args.resume_length, args.resume_tokens // args.resume_length)
        variants = {}
        for trainer in ("buddygpt", "stock Trainer"):
            for share, path in checkpoints.items():
                run = partial(resume, folder, args.resume_length, trainer == "buddygpt", path)
                variants[f"{trainer}, at {share}"] = partial(cpu_seconds, run)
        with tqdm(total=(args.rounds + 1) * len(variants), unit="resume") as progress:
            samples = alternate(variants, args.rounds, progress)
    report = Report("resume_time", ["resumed", "CPU seconds to the first batch", "ratio"])
    report.add_samples(samples, unit="CPU seconds")
    report.finish(args)


def main() -> None:
    (args,) = parse_arguments(LoaderArguments, description=__doc__)
    if args.quick:
        args.rounds, args.tokens, args.batches, args.rows, args.length = 1, 40_000, 4, 2, 64
        args.resume_tokens = 100_000
    measure_reading(args)
    measure_resuming(args)


if __name__ == "__main__":
    run_script(main)
