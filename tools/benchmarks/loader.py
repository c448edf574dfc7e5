"""The loader: blocks from token shards against the cache that `datasets.map` and `group_texts` leave behind.

    python tools/benchmarks/loader.py           # about a minute
    python tools/benchmarks/loader.py --quick   # seconds: does it run?

Wall time, because workers are processes of their own: to be run on a quiet machine. The peer is what transformers'
run_clm.py trains from: an Arrow table of equal blocks, written once and mapped into memory, shuffled by the sampler.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from ab import Report, alternate, spread
from datasets import Dataset, load_from_disk
from random_shards import make_shards
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import default_data_collator

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.data.shards.blocks import BlockDataset, BlockStream
from buddygpt.data.shards.history import make_order, update_history


@dataclass
class LoaderArguments:
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured."})
    tokens: int = field(default=20_000_000, metadata={"help": "Tokens on disk."})
    batches: int = field(default=200, metadata={"help": "Batches read in one measurement."})
    rows: int = field(default=16, metadata={"help": "Rows of a batch."})
    length: int = field(default=1024, metadata={"help": "Tokens in a row."})
    quick: bool = field(default=False, metadata={"help": "One round of little data; nothing is written."})


def write_arrow(shards: Path, folder: Path, length: int) -> Path:
    """The same tokens as `group_texts` leaves them: lists of `length` ids and as many labels."""
    tokens = np.fromfile(shards / "random.ds", "<u2").astype(np.int64)
    blocks = tokens[: len(tokens) // length * length].reshape(-1, length)
    Dataset.from_dict({"input_ids": blocks, "labels": blocks}).save_to_disk(folder)
    return folder


class Reading:
    """Opens a data set, reads some batches, and says how fast.

    Args:
        open_data: Returns a data set whose items are rows; opening belongs to the first batch.
        args: How much to read.
        workers: Processes of the loader.
        shuffle: By the sampler, or not: a stream has its own order.
    """

    def __init__(self, open_data: Callable, args: LoaderArguments, workers: int, shuffle: bool) -> None:
        self.open_data, self.args, self.workers, self.shuffle = open_data, args, workers, shuffle
        self.first: list[float] = []

    def __call__(self) -> float:
        """Tokens a second after the first batch, whose own seconds go to `first`."""
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


def main() -> None:
    (args,) = parse_arguments(LoaderArguments, description=__doc__)
    if args.quick:
        args.rounds, args.tokens, args.batches, args.rows, args.length = 1, 40_000, 4, 2, 64
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


if __name__ == "__main__":
    run_script(main)
