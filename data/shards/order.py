"""The order in which blocks are read, by address: which block stands at any position of an endless stream.

Every epoch is a permutation, and none is ever stored: a block's place is computed, at the same cost for the first
block and for the hundred billionth. So a run goes on at any step without reading what came before it, and data may be
added to it on the way.

Two kinds of epoch are woven together. Each source has an endless stream of its own, in which every epoch shows all of
its blocks once. An epoch of the mixture has a number of slots for each source, `epochs` x its blocks, and takes as
many blocks from where the source's stream stands: at half an epoch the other half follows in the mixture's next.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import MANIFEST

ROUNDS = 6


def permute(index: int, size: int, key: bytes) -> int:
    """Return the place of `index` in the permutation of `range(size)` that `key` names, in O(1) time and memory.

    The generalised Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002, section
    4), on the domain a x b that just covers `size`; what falls outside is enciphered again until it falls inside
    (cycle walking, section 3), which is rare. Its round function is keyed BLAKE2b.

    Args:
        index: From 0 to `size` - 1.
        size: What is permuted.
        key: At most 64 bytes.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        right, left = divmod(index, a)
        for number in range(ROUNDS):
            digest = blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([number])).digest()
            left, right = right, (left + int.from_bytes(digest, "little")) % (b if number % 2 else a)
        index = a * right + left  # ROUNDS is even, so `left` is below a again
        if index < size:
            return index


class EpochOrder:
    """An endless stream of numbers: epoch after epoch, each in another order that follows from the seed.

    Args:
        size: Every epoch is a permutation of `range(size)`.
        seed: Another seed, another order.
        growth: Where the size changes: pairs of an epoch and the size of it and of all later ones.
    """

    def __init__(self, size: int, seed: int | str, growth: Sequence[tuple[int, int]] = ()) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one block, not {size}")
        self.seed = seed
        self._epochs, self._sizes, self._starts = [0], [size], [0]
        for epoch, next_size in growth:
            if epoch < self._epochs[-1]:
                raise ValueError(f"growth {list(growth)}: epochs only increase")
            self._starts.append(self._starts[-1] + (epoch - self._epochs[-1]) * self._sizes[-1])
            self._epochs.append(epoch)
            self._sizes.append(next_size)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch that a position of the stream, from 0 on, lies in, and the number that stands there."""
        if position < 0:
            raise IndexError(f"position {position}")
        segment = bisect_right(self._starts, position) - 1
        epoch, offset = divmod(position - self._starts[segment], self._sizes[segment])
        epoch += self._epochs[segment]
        return epoch, permute(offset, self._sizes[segment], _key(self.seed, epoch))

    def index(self, position: int) -> int:
        """Return the number at a position."""
        return self.locate(position)[1]

    def epoch(self, position: float) -> float:
        """Return how many epochs lie before a position: 1.5 in the middle of the second."""
        segment = bisect_right(self._starts, position) - 1
        return self._epochs[segment] + (position - self._starts[segment]) / self._sizes[segment]

    def position(self, epochs: float) -> int:
        """Return the first position that has at least so many epochs before it."""
        segment = bisect_right(self._epochs, epochs) - 1
        return self._starts[segment] + math.ceil((epochs - self._epochs[segment]) * self._sizes[segment])


@lru_cache(maxsize=1024)
def _key(seed: int | str, epoch: int) -> bytes:
    return blake2b(f"{seed} {epoch}".encode()).digest()


class Share(NamedTuple):
    """What an epoch of the mixture has of a source.

    Attributes:
        blocks: Blocks there are.
        slots: Blocks that the epoch reads.
    """

    blocks: int
    slots: int


class SourceOrder:
    """The endless stream of one source's blocks, and how far the mixture has read it.

    Args:
        ranges: Its blocks; see [`BlockDataset.blocks_of`].
        seed: Another seed, another order.
        history: Pairs of an epoch of the mixture and the share from there on. The epoch of the source's own that has
            begun by then is finished before new blocks come.
    """

    def __init__(self, ranges: Sequence[range], seed: str, history: Sequence[tuple[int, Share]]) -> None:
        self._ranges, self._range_ends = ranges, [*accumulate(map(len, ranges))]
        self._epochs, self._slots, self._starts = [0], [0], [0]
        self._order: EpochOrder | None = None
        growth: list[tuple[int, int]] = []
        for epoch, share in history:
            start = self.position(epoch)
            self._epochs.append(epoch)
            self._slots.append(share.slots)
            self._starts.append(start)
            if share.blocks:
                growth.append((math.ceil(self._order.epoch(start)) if self._order else 0, share.blocks))
                self._order = EpochOrder(growth[0][1], seed, growth[1:])

    def position(self, epoch: float) -> float:
        """Return how many blocks are read before an epoch of the mixture; within one, on average over its orders."""
        stage = bisect_right(self._epochs, epoch) - 1
        return self._starts[stage] + (epoch - self._epochs[stage]) * self._slots[stage]

    def own_epochs(self, epoch: float) -> float:
        """Return how many epochs of the source's own lie before an epoch of the mixture."""
        return self._order.epoch(self.position(epoch)) if self._order else 0.0

    def block(self, epoch: int, number: int) -> int:
        """Return the block that is read as the source's n-th, from 0 on, in an epoch of the mixture."""
        index = self._order.index(self.position(epoch) + number)
        place = bisect_right(self._range_ends, index)
        return self._ranges[place][index - self._range_ends[place]]  # from the end of the range


class BlockOrder:
    """The endless stream of the blocks that a run reads: epoch after epoch of a mixture of sources.

    Args:
        blocks: The blocks of each source; see [`BlockDataset.blocks_of`].
        history: Pairs of an epoch of the mixture and what it and all later ones have of each source; the first is 0.
        seed: Another seed, another order.
    """

    def __init__(
        self, blocks: Mapping[str, Sequence[range]], history: Sequence[tuple[int, Mapping[str, Share]]], seed: int
    ) -> None:
        self.seed = seed
        self._sources = {
            name: SourceOrder(ranges, f"{seed} {name}", [(e, shares.get(name, Share(0, 0))) for e, shares in history])
            for name, ranges in blocks.items()
        }
        self._epochs = [epoch for epoch, _ in history]
        self._names = [[*shares] for _, shares in history]
        self._ends = [[*accumulate(share.slots for share in shares.values())] for _, shares in history]
        (_, size), *growth = [(epoch, ends[-1]) for epoch, ends in zip(self._epochs, self._ends, strict=True)]
        self._slots = EpochOrder(size, seed, growth)

    def index(self, position: int) -> int:
        """Return the block at a position of the stream, from 0 on."""
        epoch, slot = self._slots.locate(position)
        stage = bisect_right(self._epochs, epoch) - 1
        ends = self._ends[stage]
        source = bisect_right(ends, slot)
        number = slot - (ends[source - 1] if source else 0)
        return self._sources[self._names[stage][source]].block(epoch, number)

    def epoch(self, position: int) -> float:
        """Return how many epochs of the mixture lie before a position: 1.5 in the middle of the second."""
        return self._slots.epoch(position)

    def position(self, epochs: float) -> int:
        """Return the first position that has at least so many epochs of the mixture before it."""
        return self._slots.position(epochs)

    def sources_read(self, position: int) -> dict[str, tuple[float, float]]:
        """Return of each source how many of its own epochs lie before a position, and its share of all blocks read.

        Within an epoch of the mixture that has begun, sources are counted as if they took turns: exact at its end.
        """
        epoch = self.epoch(position)
        return {
            name: (source.own_epochs(epoch), source.position(epoch) / max(position, 1))
            for name, source in self._sources.items()
        }

    def which_blocks(self, step: int, global_batch: int) -> list[int]:
        """Return the blocks that a step reads, in the order of the stream.

        Process p of P reads, as its m-th micro-batch of b blocks, those from (m P + p) b on.

        Args:
            step: As it is logged: 1 is the first.
            global_batch: Blocks in a step: per device x accumulation x processes.
        """
        return [self.index(position) for position in range((step - 1) * global_batch, step * global_batch)]


class BlockStream(Dataset):
    """All that a run reads, in order: item `p` is the block at position `p` of the stream.

    Args:
        blocks: What is read from.
        order: Which block stands where.
        length: Blocks that the run reads: steps x blocks in a step.
    """

    def __init__(self, blocks: BlockDataset, order: BlockOrder, length: int) -> None:
        self.blocks, self.order, self.length = blocks, order, length
        self.block_size = blocks.block_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return the block as [`BlockDataset`] gives it."""
        return self.blocks[self.order.index(position)]


def update_history(
    history: list[dict[str, Any]], blocks: BlockDataset, step: int, global_batch: int
) -> list[dict[str, Any]]:
    """Return which shards a run reads in which mixture, and from which epoch on, with what has changed since.

    New shards may follow the ones there were, and the epochs of the sources may be others. The epoch of the mixture
    that has begun is read to its end as it was promised; later ones follow the manifest as it is now.

    Args:
        history: As an earlier call returned it, from the run card; empty at the beginning of a run.
        blocks: The data as it is now.
        step: Steps taken before.
        global_batch: Blocks in a step.

    Returns:
        One entry per state of the data: `step` at which it was found; `epoch`, the first of the mixture that is read
        from it; of each of `sources` a [`Share`]; `manifest_sha256`; and of every new shard `file`, `source`, `tokens`
        and `sha256`.

    Raises:
        UserError: A shard that the run has read is missing, was changed or stands elsewhere in the list.
    """
    known = [shard for entry in history for shard in entry["shards"]]
    found = [{key: shard[key] for key in ("file", "source", "tokens", "sha256")} for shard in blocks.shards]
    for number, (before, now) in enumerate(zip_longest(known, found[: len(known)])):
        if before != now:
            raise UserError(
                f"cannot resume on {blocks.folder / MANIFEST}: shard {number} of the run was {_shown(before)}, "
                f"now it is {_shown(now)}. Data can only be added after what was there: bring it back, or give "
                "another --output_dir"
            )
    sources = {name: share._asdict() for name, share in count_slots(blocks).items()}
    if history and len(found) == len(known) and sources == history[-1]["sources"]:
        return history
    begun = math.ceil(make_order(history, blocks, 0).epoch(step * global_batch)) if history else 0
    entry = {
        "step": step,
        "epoch": max([begun, *(entry["epoch"] for entry in history)]),
        "sources": sources,
        "manifest_sha256": file_sha256(blocks.folder / MANIFEST),
        "shards": found[len(known) :],
    }
    return [*history, entry]


def count_slots(blocks: BlockDataset) -> dict[str, Share]:
    """Return what an epoch of the mixture has of each source: its epochs x its blocks, but at least one block."""
    counts = {source: sum(map(len, ranges)) for source, ranges in blocks.blocks_of.items()}
    return {source: Share(n, max(round(blocks.epochs[source] * n), min(n, 1))) for source, n in counts.items()}


def make_order(history: list[dict[str, Any]], blocks: BlockDataset, seed: int) -> BlockOrder:
    """Return the order over the data that [`update_history`] describes."""
    stages = [
        (entry["epoch"], {name: Share(**share) for name, share in entry["sources"].items()}) for entry in history
    ]
    return BlockOrder(blocks.blocks_of, stages, seed)


def _shown(shard: dict[str, Any] | None) -> str:
    return f"{shard['file']} of {shard.get('source')} (sha256 {shard['sha256'][:12]})" if shard else "missing"
