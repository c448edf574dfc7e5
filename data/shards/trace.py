"""Trace the tokens of a block back to source, shard and document.

Next to every shard lies `NAME.documents.parquet` with one row per document, in the order of the shard: `id`
(FILE:ROW), `chars`, and the scores from the source or from cleaning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import documents_file

MAX_BLOCKS = 8  # described in one line


@dataclass(frozen=True)
class Passage:
    """The part of a block that lies in one shard.

    Attributes:
        shard: Name of the token file.
        source: Source of the shard.
        first, last: The first and last document in the passage, counted from 0 in the order of the shard.
        tokens: Tokens of each of these documents in the passage.
        documents: The row of each of these documents in the shard's table: `id`, `chars`, scores.
    """

    shard: str
    source: str
    first: int
    last: int
    tokens: tuple[int, ...]
    documents: tuple[dict[str, Any], ...]


def trace_block(blocks: BlockDataset, index: int) -> Iterator[Passage]:
    """Yield the passages of a block, in order. Reads only the parts of the files that describe them."""
    block_start = index * blocks.block_size
    block_stop = block_start + blocks.block_size
    shard_start = 0
    for shard in blocks.shards:
        shard_stop = shard_start + shard["tokens"]
        if block_start < shard_stop and shard_start < block_stop:
            # The bounds of the passage, counted from the start of the shard.
            begin = max(block_start - shard_start, 0)
            end = min(block_stop, shard_stop) - shard_start
            yield _read_passage(blocks.folder, shard, begin, end)
        shard_start = shard_stop


def _read_passage(folder: Path, shard: dict[str, Any], begin: int, end: int) -> Passage:
    document_ends = np.memmap(folder / f"{shard['file']}.index", "<u8", "r")
    first, last = np.searchsorted(document_ends, np.array([begin, end - 1], "<u8"), side="right").tolist()
    bounds = [begin, *document_ends[first:last].tolist(), end]
    tokens = np.diff(bounds).tolist()
    rows = read_rows(folder / documents_file(shard), first, last)
    return Passage(shard["file"], shard["source"], first, last, tuple(tokens), tuple(rows))


def read_rows(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Return the rows `first` to `last` of a Parquet table, both included. Reads only their row groups."""
    with pq.ParquetFile(path) as table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        group_ends = np.cumsum(sizes)
        first_group, last_group = np.searchsorted(group_ends, [first, last], side="right").tolist()
        group_start = int(group_ends[first_group]) - sizes[first_group]
        groups = table.read_row_groups(list(range(first_group, last_group + 1)))
        return groups.slice(first - group_start, last - first + 1).to_pylist()


def describe_blocks(blocks: BlockDataset, indices: Sequence[int]) -> str:
    """Return one line that says where blocks come from, shard by shard; only the first few of many blocks."""
    places: dict[str, list[str]] = {}
    for index in indices[:MAX_BLOCKS]:
        for passage in trace_block(blocks, index):
            documents = f"{passage.first}-{passage.last}"
            first_id, last_id = passage.documents[0]["id"], passage.documents[-1]["id"]
            ids = first_id if first_id == last_id else f"{first_id} to {last_id}"
            shard = f"{passage.shard} ({passage.source})"
            places.setdefault(shard, []).append(f"block {index} = documents {documents}, {ids}")

    line = "; ".join(f"{shard}: {', '.join(found)}" for shard, found in places.items())
    rest = len(indices) - MAX_BLOCKS
    if rest > 0:
        line += f"; and {rest} more blocks"
    return line
