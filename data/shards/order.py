"""The order in which a run reads its blocks, computed position by position.

A source epoch visits every block of one source once. A mixture epoch takes a fixed number of blocks from each source:
its `slots`. A source with half as many slots as blocks shows its other half in the next mixture epoch.

Every epoch is a permutation that is computed, never stored. Finding the block at a position takes the same time for
the first position and for the hundred billionth, so a run resumes at any step without reading what came before it.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

ROUNDS = 6


def permute(index: int, size: int, key: bytes) -> int:
    """Return the image of `index` under the permutation of `range(size)` given by `key`, in O(1) time and memory.

    This is the generalized Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002,
    section 4), on the smallest domain a x b that covers `size`. Results outside `range(size)` are encrypted again
    (cycle walking, section 3), which is rare. The round function is keyed BLAKE2b.

    Args:
        index: From 0 to `size` - 1.
        size: Number of elements.
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


@lru_cache(maxsize=1024)
def _key(seed: int | str, epoch: int) -> bytes:
    return blake2b(f"{seed} {epoch}".encode()).digest()


class Stage(NamedTuple):
    """Consecutive epochs of the same size.

    Attributes:
        epoch: The first of them.
        start: Position in the stream at which it begins.
        size: Positions in each epoch.
    """

    epoch: int
    start: int
    size: int


class Stages:
    """The stages of an endless stream. The last one never ends; only data added to a run begins another."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []

    def append(self, epoch: int, size: int) -> Stage:
        """Let all epochs from this one on have this size. The first stage must begin at epoch 0."""
        start = 0
        if self._stages:
            last = self._stages[-1]
            if epoch < last.epoch:
                raise ValueError(f"a stage from epoch {epoch} cannot follow one from epoch {last.epoch}")
            start = last.start + (epoch - last.epoch) * last.size
        stage = Stage(epoch, start, size)
        self._stages.append(stage)
        return stage

    def at_epoch(self, epoch: float) -> Stage:
        """Return the stage of an epoch; of stages that begin at the same epoch, the last."""
        return self._stages[bisect_right(self._stages, epoch, key=lambda stage: stage.epoch) - 1]

    def at_position(self, position: float) -> Stage:
        """Return the stage of a position in the stream."""
        return self._stages[bisect_right(self._stages, position, key=lambda stage: stage.start) - 1]


class EpochOrder:
    """An endless stream of numbers: epoch after epoch, each a different permutation of `range(size)`.

    Args:
        size: Numbers in an epoch.
        seed: Each seed gives another order.
        growth: Changes of the size, as pairs (first epoch, size from then on).
    """

    def __init__(self, size: int, seed: int | str, growth: Sequence[tuple[int, int]] = ()) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one block, not {size}")
        self.seed = seed
        self._stages = Stages()
        self._stages.append(0, size)
        for epoch, next_size in growth:
            self.grow(epoch, next_size)

    def grow(self, epoch: int, size: int) -> None:
        """Let all epochs from this one on be permutations of `range(size)`."""
        self._stages.append(epoch, size)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position in the stream, counted from 0, and the number at that position."""
        if position < 0:
            raise IndexError(f"position {position}")
        stage = self._stages.at_position(position)
        epochs, offset = divmod(position - stage.start, stage.size)
        epoch = stage.epoch + epochs
        return epoch, permute(offset, stage.size, _key(self.seed, epoch))

    def index(self, position: int) -> int:
        """Return the number at a position."""
        return self.locate(position)[1]

    def epoch(self, position: float) -> float:
        """Return the number of epochs before a position: 1.5 in the middle of the second."""
        stage = self._stages.at_position(position)
        return stage.epoch + (position - stage.start) / stage.size

    def position(self, epochs: float) -> int:
        """Return the first position with at least so many epochs before it."""
        stage = self._stages.at_epoch(epochs)
        return stage.start + math.ceil((epochs - stage.epoch) * stage.size)


class Quota(NamedTuple):
    """The part of a source in one mixture epoch.

    Attributes:
        blocks: Blocks that the source has.
        slots: Blocks that the mixture epoch takes from it.
    """

    blocks: int
    slots: int


class SourceOrder:
    """The endless stream of one source's blocks, and how far the mixture has read it.

    Args:
        ranges: Blocks of the source; see [`BlockDataset.blocks_of`].
        seed: Each seed gives another order.
        history: Pairs of a mixture epoch and the source's quota from then on. New blocks join after the current source
            epoch.
    """

    def __init__(self, ranges: Sequence[range], seed: str, history: Sequence[tuple[int, Quota]]) -> None:
        self._ranges = ranges
        self._range_ends = list(accumulate(len(each) for each in ranges))
        self._mixture = Stages()  # in epochs of the mixture, positions in the source's stream
        self._order: EpochOrder | None = None  # in epochs of the source; None until it has blocks
        for epoch, quota in history:
            stage = self._mixture.append(epoch, quota.slots)
            if not quota.blocks:
                continue
            if self._order is None:
                self._order = EpochOrder(quota.blocks, seed)
            else:
                next_epoch = math.ceil(self._order.epoch(stage.start))
                self._order.grow(next_epoch, quota.blocks)

    def position(self, epoch: float) -> float:
        """Return the blocks read before a mixture epoch; within an epoch, the average over its permutations."""
        stage = self._mixture.at_epoch(epoch)
        return stage.start + (epoch - stage.epoch) * stage.size

    def source_epochs(self, epoch: float) -> float:
        """Return the source epochs before a mixture epoch."""
        return self._order.epoch(self.position(epoch)) if self._order else 0.0

    def block(self, epoch: int, number: int) -> int:
        """Return the block that a mixture epoch takes as the `number`-th from this source, counted from 0."""
        index = self._order.index(self.position(epoch) + number)
        place = bisect_right(self._range_ends, index)
        distance_to_end = self._range_ends[place] - index
        return self._ranges[place][-distance_to_end]


class BlockOrder:
    """The endless stream of the blocks that a run reads: one mixture epoch after the other.

    Args:
        blocks: Blocks of each source; see [`BlockDataset.blocks_of`].
        history: Pairs of a mixture epoch and the quotas of all sources from then on. The first epoch is 0.
        seed: Each seed gives another order.
    """

    def __init__(
        self, blocks: Mapping[str, Sequence[range]], history: Sequence[tuple[int, Mapping[str, Quota]]], seed: int
    ) -> None:
        self.seed = seed
        self._sources: dict[str, SourceOrder] = {}
        for name, ranges in blocks.items():
            own_history = [(epoch, quotas.get(name, Quota(0, 0))) for epoch, quotas in history]
            self._sources[name] = SourceOrder(ranges, f"{seed} {name}", own_history)

        # Slots are numbered source by source, then permuted. Per entry of the history: its first epoch, the names of
        # its sources, and the number of the slot that follows the last one of each source.
        self._epochs: list[int] = []
        self._names: list[list[str]] = []
        self._ends: list[list[int]] = []
        for epoch, quotas in history:
            self._epochs.append(epoch)
            self._names.append(list(quotas))
            self._ends.append(list(accumulate(quota.slots for quota in quotas.values())))
        sizes = [ends[-1] for ends in self._ends]
        growth = list(zip(self._epochs[1:], sizes[1:], strict=True))
        self._slots = EpochOrder(sizes[0], seed, growth)

    def index(self, position: int) -> int:
        """Return the block at a position of the stream, counted from 0."""
        epoch, slot = self._slots.locate(position)
        entry = bisect_right(self._epochs, epoch) - 1
        ends = self._ends[entry]
        source = bisect_right(ends, slot)
        first_slot = ends[source - 1] if source else 0
        name = self._names[entry][source]
        return self._sources[name].block(epoch, slot - first_slot)

    def epoch(self, position: int) -> float:
        """Return the number of mixture epochs before a position: 1.5 in the middle of the second."""
        return self._slots.epoch(position)

    def position(self, epochs: float) -> int:
        """Return the first position with at least so many mixture epochs before it."""
        return self._slots.position(epochs)

    def progress_by_source(self, position: int) -> dict[str, tuple[float, float]]:
        """Return for each source its source epochs before a position, and its share of all blocks read.

        Exact at the end of a mixture epoch. Within one, the sources count as evenly spread.
        """
        epoch = self.epoch(position)
        progress = {}
        for name, source in self._sources.items():
            share = source.position(epoch) / max(position, 1)
            progress[name] = (source.source_epochs(epoch), share)
        return progress

    def which_blocks(self, step: int, global_batch: int) -> list[int]:
        """Return the blocks that a step reads, in the order of the stream.

        Micro-batch m of process p is the part that begins at (m P + p) b, for P processes and b blocks per device.

        Args:
            step: As logged, so the first step is 1.
            global_batch: Blocks in a step: per device x accumulation x processes.
        """
        first = (step - 1) * global_batch
        return [self.index(position) for position in range(first, first + global_batch)]
