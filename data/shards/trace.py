"""Where the tokens of a block come from: source, shard, documents by file and row.

Beside every shard lies `NAME.documents.parquet` with one row for each of its documents, in order: `id` (FILE:ROW),
`chars`, and the scores that its source or cleaning gave it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import documents_file

SHOWN = 8


@dataclass(frozen=True)
class Passage:
    """A part of a block that lies in one shard.

    Attributes:
        shard: Name of the token file.
        source: What the shard was made from.
        first, last: The documents of the shard that it touches, counted from 0 in the shard's order.
        tokens: How many tokens of each of them it holds.
        documents: What the shard's table has of each of them: `id`, `chars`, scores.
    """

    shard: str
    source: str
    first: int
    last: int
    tokens: tuple[int, ...]
    documents: tuple[dict[str, Any], ...]


def trace_block(blocks: BlockDataset, index: int) -> Iterator[Passage]:
    """Yield the passages that make up a block, in order; reads nothing but what belongs to them."""
    start, stop = index * blocks.block_size, (index + 1) * blocks.block_size
    shard_start = 0
    for shard in blocks.shards:
        shard_stop = shard_start + shard["tokens"]
        if start < shard_stop and shard_start < stop:
            ends = np.memmap(blocks.folder / f"{shard['file']}.index", "<u8", "r")
            begin, end = max(start - shard_start, 0), min(stop, shard_stop) - shard_start
            first, last = np.searchsorted(ends, np.array([begin, end - 1], "<u8"), side="right").tolist()
            tokens = np.diff([begin, *ends[first:last].tolist(), end]).tolist()
            rows = read_rows(blocks.folder / documents_file(shard), first, last)
            yield Passage(shard["file"], shard["source"], first, last, tuple(tokens), tuple(rows))
        shard_start = shard_stop


def read_rows(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Return rows of a table, both ends included; reads only the row groups that they lie in."""
    with pq.ParquetFile(path) as table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        ends = np.cumsum(sizes)
        low, high = np.searchsorted(ends, [first, last], side="right").tolist()
        begin = first - int(ends[low]) + sizes[low]
        return table.read_row_groups([*range(low, high + 1)]).slice(begin, last - first + 1).to_pylist()


def describe_blocks(blocks: BlockDataset, indices: Sequence[int]) -> str:
    """Say in one line where the blocks come from, shard by shard; of many, the first few."""
    places: dict[str, list[str]] = {}
    for index in indices[:SHOWN]:
        for passage in trace_block(blocks, index):
            ids = [document["id"] for document in (passage.documents[0], passage.documents[-1])]
            named = " to ".join(dict.fromkeys(ids))
            place = f"block {index} = documents {passage.first}-{passage.last}, {named}"
            places.setdefault(f"{passage.shard} ({passage.source})", []).append(place)
    rest = len(indices) - SHOWN
    shown = "; ".join(f"{shard}: {', '.join(found)}" for shard, found in places.items())
    return shown + (f"; and {rest} more blocks" if rest > 0 else "")
