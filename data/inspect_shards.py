"""Inspect a folder of token shards: print its contents, verify its files, trace a block to its documents.

    python data/inspect_shards.py OUT/train                                     # sources, mixture, document lengths
    python data/inspect_shards.py OUT/train --output lengths.png                # also plot the document lengths
    python data/inspect_shards.py OUT/train --verify                            # hash all files
    python data/inspect_shards.py OUT/train --block 123 --block_size 1024       # documents and sources of a block
    python data/inspect_shards.py OUT/train --block 123 --tokenizer DIR         # and its text

The exit status is 0 if all is well, and 2 if files are damaged or missing; the last line names them.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import ArgumentParser, UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import TokenShards, verify_shards
from buddygpt.data.shards.trace import trace_block

DOCUMENTS_AT_ONCE = 1_000_000
BAR_WIDTH = 50
COLUMNS = ("source", "language", "tokens", "documents", "bytes/token", "epochs", "share")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="folder of token shards: OUT/train or OUT/eval")
    parser.add_argument("--verify", action="store_true", help="hash every file and name all damaged ones")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="plot the document lengths to this file")
    parser.add_argument("--block", type=int, metavar="N", help="show the origin of this block, counted from 0")
    parser.add_argument("--block_size", type=int, default=1024, metavar="B", help="tokens in a block (default: 1024)")
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer of the shards, to show the block's text")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    shows_block = arguments.block is not None
    if arguments.verify:
        manifest = verify_shards(arguments.folder)
        print(f"{arguments.folder}: all {len(manifest['shards'])} shards are as they were written")
    if shows_block:
        print_block(arguments)
    if arguments.output or not (arguments.verify or shows_block):
        shards = TokenShards(arguments.folder)
        lengths = count_lengths(shards)
        print_statistics(shards, lengths)
        if arguments.output:
            plot_lengths(lengths, arguments.output)


def count_lengths(shards: TokenShards) -> dict[int, int]:
    """Return the number of documents with n to 2n - 1 tokens, separators included, for each power of two n."""
    counts = np.zeros(64, np.int64)
    for shard in tqdm(shards.shards, desc="reading lengths", unit="shard", leave=False):
        ends = np.memmap(shards.folder / f"{shard['file']}.index", "<u8", "r")
        last_end = 0
        for begin in range(0, len(ends), DOCUMENTS_AT_ONCE):
            part = ends[begin : begin + DOCUMENTS_AT_ONCE].astype(np.int64)
            lengths = np.diff(part, prepend=last_end)
            _, exponents = np.frexp(lengths)  # length = mantissa x 2**exponent, with a mantissa in [0.5, 1)
            counts += np.bincount(exponents - 1, minlength=64)
            last_end = part[-1]
    used = counts.nonzero()[0].tolist()
    return {2**exponent: int(counts[exponent]) for exponent in range(used[0], used[-1] + 1)}


def print_statistics(shards: TokenShards, lengths: dict[int, int]) -> None:
    """Print the totals, a table of sources and languages, and a histogram of document lengths."""
    manifest = shards.manifest
    print(
        f"{shards.folder}: {shards.tokens:,} tokens ({manifest['dtype']}), {shards.documents:,} documents, "
        f"{shards.text_bytes / shards.tokens:.2f} bytes of text per token\n"
        f"shards: {len(shards.shards)}, preparation runs: {len(manifest['generations'])}, "
        f"tokenizer: {manifest['tokenizer']}\n"
    )

    rows = [COLUMNS, *make_rows(manifest["sources"])]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(names + numbers))

    print(f"\n{'tokens':>23}  {'documents':>13}")
    most = max(lengths.values())
    for length, count in lengths.items():
        bar = "█" * round(BAR_WIDTH * count / most)
        print(f"{length:>10,} - {2 * length - 1:>10,}  {count:>13,}  {bar}".rstrip())


def make_rows(sources: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for every source, then one for every language."""
    rows = []
    by_language: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        language = source["language"] or "-"
        by_language.setdefault(language, []).append(source)
        rows.append(_make_row(source["name"], language, [source]))
    for language, group in by_language.items():
        rows.append(_make_row("all", language, group))
    return rows


def _make_row(name: str, language: str, group: list[dict[str, Any]]) -> tuple[str, ...]:
    tokens = sum(source["tokens"] for source in group)
    documents = sum(source["documents"] for source in group)
    text_bytes = sum(source["text_bytes"] for source in group)
    tokens_read = sum(source["epochs"] * source["tokens"] for source in group)
    share = sum(source["share"] for source in group)
    return (
        name,
        language,
        f"{tokens:,}",
        f"{documents:,}",
        f"{text_bytes / max(tokens, 1):.2f}",
        f"{tokens_read / max(tokens, 1):.3g}",
        f"{share:.1%}",
    )


def plot_lengths(lengths: dict[int, int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.bar([f"{length:,}" for length in lengths], list(lengths.values()))
    axis.set(xlabel="tokens in a document, lower bound", ylabel="documents")
    axis.tick_params(axis="x", rotation=45)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def print_block(arguments: argparse.Namespace) -> None:
    """Print the documents of a block in order, with their text if a tokenizer is given."""
    # Check the arguments before the output starts.
    if arguments.block_size < 1:
        raise UserError(f"block_size is {arguments.block_size}; use at least 1")
    blocks = BlockDataset(arguments.folder, arguments.block_size)
    if not 0 <= arguments.block < len(blocks):
        raise UserError(
            f"there is no block {arguments.block}: with {blocks.block_size} tokens each, there are blocks 0 to "
            f"{len(blocks) - 1}"
        )
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
        blocks.check_tokenizer(tokenizer)

    # Walk through the block: passages by shard, documents in each passage.
    ids = blocks[arguments.block]["input_ids"]
    place = 0
    print(f"block {arguments.block} of {len(blocks):,}, {arguments.block_size:,} tokens:")
    for passage in trace_block(blocks, arguments.block):
        print(f"\n{passage.shard}, source {passage.source}, documents {passage.first}-{passage.last}")
        for document, tokens in zip(passage.documents, passage.tokens, strict=True):
            print(f"  {tokens:>6,} tokens  {document['id']}  {_describe_columns(document)}")
            if tokenizer:
                print(f"         {tokenizer.decode(ids[place : place + tokens])!r}")
            place += tokens


def _describe_columns(document: dict[str, Any]) -> str:
    columns = []
    for key, value in document.items():
        if key == "id" or value is None:
            continue
        number = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        columns.append(f"{key} {number}")
    return "  ".join(columns)


if __name__ == "__main__":
    run_script(main)
