"""Look into a folder of token shards: what is in it, is it whole, and where does a block come from?

    python data/inspect_shards.py OUT/train                                     # sources, mixture, lengths
    python data/inspect_shards.py OUT/train --output lengths.png                # the lengths also as a picture
    python data/inspect_shards.py OUT/train --verify                            # hash everything again
    python data/inspect_shards.py OUT/train --block 123 --block_size 1024       # documents and sources of a block
    python data/inspect_shards.py OUT/train --block 123 --tokenizer DIR         # and its text

Exit status: 0 all is well, 2 something is damaged or missing, and the last line says what.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import TokenShards, verify_shards
from buddygpt.data.shards.trace import trace_block

CHUNK = 1_000_000  # document ends that are read at once
BAR = 50  # characters of the longest bar
COLUMNS = ("source", "language", "tokens", "documents", "bytes/token", "epochs", "share")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder of token shards: OUT/train or OUT/eval")
    parser.add_argument("--verify", action="store_true", help="read every shard again and name all damaged ones")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="draw the lengths of the documents")
    parser.add_argument("--block", type=int, metavar="N", help="say where this block comes from, counted from 0")
    parser.add_argument("--block_size", type=int, default=1024, metavar="B", help="tokens in a block (default: 1024)")
    parser.add_argument("--tokenizer", metavar="DIR", help="the one that made the shards, to show the block's text")
    return parser.parse_args()


def count_lengths(shards: TokenShards) -> dict[int, int]:
    """Return how many documents have n to 2n - 1 tokens, separators included, for every power of two n there is."""
    counts = np.zeros(64, np.int64)
    for shard in tqdm(shards.shards, desc="reading lengths", unit="shard", leave=False):
        ends, last = np.memmap(shards.folder / f"{shard['file']}.index", "<u8", "r"), 0
        for begin in range(0, len(ends), CHUNK):
            part = ends[begin : begin + CHUNK].astype(np.int64)
            counts += np.bincount(np.frexp(np.diff(part, prepend=last))[1] - 1, minlength=64)
            last = part[-1]
    found = counts.nonzero()[0].tolist()
    return {2**exponent: int(counts[exponent]) for exponent in range(found[0], found[-1] + 1)}


def describe_sources(sources: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table: every source, then every language."""
    by_language = defaultdict(list)
    for source in sources:
        by_language[source["language"] or "-"].append(source)
        yield _row(source["name"], source["language"] or "-", [source])
    for language, group in by_language.items():
        yield _row("all", language, group)


def _row(name: str, language: str, group: list[dict[str, Any]]) -> tuple[str, ...]:
    tokens, documents, size = (sum(each[key] for each in group) for key in ("tokens", "documents", "text_bytes"))
    epochs = sum(each["epochs"] * each["tokens"] for each in group) / max(tokens, 1)
    counts = f"{tokens:,}", f"{documents:,}", f"{size / max(tokens, 1):.2f}"
    return name, language, *counts, f"{epochs:.3g}", f"{sum(each['share'] for each in group):.1%}"


def print_statistics(shards: TokenShards, lengths: dict[int, int]) -> None:
    manifest = shards.manifest
    print(
        f"{shards.folder}: {shards.tokens:,} tokens ({manifest['dtype']}), {shards.documents:,} documents, "
        f"{shards.text_bytes / shards.tokens:.2f} bytes of text per token\n"
        f"shards: {len(shards.shards)}, generations: {len(manifest['generations'])}, "
        f"tokenizer: {manifest['tokenizer']}\n"
    )
    rows = [COLUMNS, *describe_sources(manifest["sources"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(row)).rstrip())
    print(f"\n{'tokens':>23}  {'documents':>13}")
    for length, count in lengths.items():
        bar = "█" * round(BAR * count / max(lengths.values()))
        print(f"{length:>10,} - {2 * length - 1:>10,}  {count:>13,}  {bar}".rstrip())


def plot_lengths(lengths: dict[int, int], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.bar([f"{length:,}" for length in lengths], [*lengths.values()])
    axis.set(xlabel="tokens of a document, from ... on", ylabel="documents")
    axis.tick_params(axis="x", rotation=45)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    os.replace(partial, path)
    print(f"wrote {path}")


def print_block(arguments: argparse.Namespace) -> None:
    """Print the documents of a block, in its order, and their text if there is a tokenizer."""
    if arguments.block_size < 1:
        raise UserError(f"block_size is {arguments.block_size}; use at least 1")
    blocks = BlockDataset(arguments.folder, arguments.block_size)
    if not 0 <= arguments.block < len(blocks):
        last = len(blocks) - 1
        raise UserError(f"there is no block {arguments.block}: of {blocks.block_size} tokens there are 0 to {last}")
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if tokenizer:
        blocks.check_tokenizer(tokenizer)
    ids, place = blocks[arguments.block]["input_ids"], 0
    print(f"block {arguments.block} of {len(blocks):,}, {arguments.block_size:,} tokens:")
    for passage in trace_block(blocks, arguments.block):
        print(f"\n{passage.shard}, source {passage.source}, documents {passage.first}-{passage.last}")
        for row, tokens in zip(passage.documents, passage.tokens, strict=True):
            facts = [f"{key} {_number(value)}" for key, value in row.items() if key != "id" and value is not None]
            print(f"  {tokens:>6,} tokens  {row['id']}  {'  '.join(facts)}")
            if tokenizer:
                print(f"         {tokenizer.decode(ids[place : place + tokens])!r}")
            place += tokens


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.verify:
        manifest = verify_shards(arguments.folder)
        print(f"{arguments.folder}: all {len(manifest['shards'])} shards are as they were written")
    if arguments.block is not None:
        print_block(arguments)
    if arguments.output or not (arguments.verify or arguments.block is not None):
        shards = TokenShards(arguments.folder)
        lengths = count_lengths(shards)
        print_statistics(shards, lengths)
        if arguments.output:
            plot_lengths(lengths, arguments.output)


if __name__ == "__main__":
    run_script(main)
