"""Where the tokens of a block come from: shard, documents, input files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .token_shards import BlockDataset

SHOWN = 8


@dataclass(frozen=True)
class Passage:
    """A part of a block that lies in one shard.

    Attributes:
        shard: Name of the token file.
        first, last: The documents of the shard that it touches, counted from 0 in the shard's order.
        sources: The input files that the shard was made from.
    """

    shard: str
    first: int
    last: int
    sources: tuple[str, ...]


def trace_block(blocks: BlockDataset, index: int) -> Iterator[Passage]:
    """Yield the passages that make up a block, in order; reads the shards' document ends only."""
    start, stop = index * blocks.block_size, (index + 1) * blocks.block_size
    shard_start = 0
    for shard in blocks.shards:
        shard_stop = shard_start + shard["tokens"]
        if start < shard_stop and shard_start < stop:
            ends = np.memmap(blocks.folder / f"{shard['file']}.index", "<u8", "r")
            inside = np.array([max(start - shard_start, 0), min(stop, shard_stop) - shard_start - 1], "<u8")
            first, last = np.searchsorted(ends, inside, side="right")
            yield Passage(shard["file"], int(first), int(last), tuple(shard["sources"]))
        shard_start = shard_stop


def describe_blocks(blocks: BlockDataset, indices: Sequence[int]) -> str:
    """Say in one line where the blocks come from, shard by shard; of many, the first few."""
    places: dict[str, list[str]] = {}
    for index in indices[:SHOWN]:
        for passage in trace_block(blocks, index):
            files = ", ".join(passage.sources[:2]) + (", ..." if len(passage.sources) > 2 else "")
            place = f"block {index} = documents {passage.first}-{passage.last}"
            places.setdefault(f"{passage.shard} ({files})", []).append(place)
    rest = len(indices) - SHOWN
    shown = "; ".join(f"{shard}: {', '.join(found)}" for shard, found in places.items())
    return shown + (f"; and {rest} more blocks" if rest > 0 else "")
