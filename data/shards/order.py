"""The order in which a run reads its blocks, computed position by position.

A source epoch visits every block of one source once. A mixture epoch takes a fixed number of blocks from each source:
its `slots`. A source with half as many slots as blocks shows its other half in the next mixture epoch.

Two readings of a block are far apart: a mixture epoch consists of parts, at least four for each time that a source is
repeated, and at least one whole part lies between them. (Only where blocks are appended may they come closer.)

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
PARTS = 4  # of a mixture epoch, for each time that its most repeated source is shown


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
def _key(seed: int | str, name: int | str) -> bytes:
    return blake2b(f"{seed} {name}".encode()).digest()


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

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return the epoch of a position, how far it is from the start of that epoch, and the epoch's size."""
        if position < 0:
            raise IndexError(f"position {position}")
        stage = self.at_position(position)
        epochs, offset = divmod(position - stage.start, stage.size)
        return stage.epoch + epochs, offset, stage.size

    def epoch(self, position: float) -> float:
        """Return the number of epochs before a position: 1.5 in the middle of the second."""
        stage = self.at_position(position)
        return stage.epoch + (position - stage.start) / stage.size

    def position(self, epochs: float) -> int:
        """Return the first position with at least so many epochs before it."""
        stage = self.at_epoch(epochs)
        return stage.start + math.ceil((epochs - stage.epoch) * stage.size)


class EpochOrder:
    """An endless stream of numbers: epoch after epoch, each a different permutation of `range(size)`.

    Args:
        size: Numbers in an epoch.
        seed: Each seed gives another order.
        growth: Changes of the size, as pairs (first epoch, size from then on).
        halves: All epochs begin with the same half of the numbers, chosen by the seed. So at least `size // 2` numbers
            lie between two occurrences of a number, where the size stays the same.
    """

    def __init__(
        self, size: int, seed: int | str, growth: Sequence[tuple[int, int]] = (), halves: bool = False
    ) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one block, not {size}")
        self.seed, self.halves = seed, halves
        self._stages = Stages()
        self._stages.append(0, size)
        for epoch, next_size in growth:
            self.grow(epoch, next_size)

    def grow(self, epoch: int, size: int) -> None:
        """Let all epochs from this one on be permutations of `range(size)`."""
        self._stages.append(epoch, size)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position in the stream, counted from 0, and the number at that position."""
        epoch, offset, size = self._stages.locate(position)
        if not self.halves:
            return epoch, permute(offset, size, _key(self.seed, epoch))
        half = -(-size // 2)
        if offset < half:
            place = permute(offset, half, _key(self.seed, f"{epoch} first"))
        else:
            place = half + permute(offset - half, size - half, _key(self.seed, f"{epoch} second"))
        return epoch, permute(place, size, _key(self.seed, "halves"))

    def index(self, position: int) -> int:
        """Return the number at a position."""
        return self.locate(position)[1]

    def epoch(self, position: float) -> float:
        """Return the number of epochs before a position: 1.5 in the middle of the second."""
        return self._stages.epoch(position)


class Quota(NamedTuple):
    """The part of a source in one mixture epoch.

    Attributes:
        blocks: Blocks that the source has.
        slots: Blocks that the mixture epoch takes from it.
    """

    blocks: int
    slots: int

    @property
    def repeats(self) -> int:
        """Times that the mixture epoch shows a block at most; 0 without blocks."""
        return -(-self.slots // self.blocks) if self.blocks else 0


class SourceOrder:
    """The endless stream of one source's blocks, and how far the mixture has read it.

    Args:
        ranges: Blocks of the source; see [`BlockDataset.blocks_of`].
        seed: Each seed gives another order.
        history: Pairs of a mixture epoch and the source's quota from then on. New blocks join after the current source
            epoch.
        halves: As in [`EpochOrder`].
    """

    def __init__(self, ranges: Sequence[range], seed: str, history: Sequence[tuple[int, Quota]], halves: bool) -> None:
        self._ranges = ranges
        self._range_ends = list(accumulate(len(each) for each in ranges))
        self._mixture = Stages()  # in epochs of the mixture, positions in the source's stream
        self._order: EpochOrder | None = None  # in epochs of the source; None until it has blocks
        for epoch, quota in history:
            stage = self._mixture.append(epoch, quota.slots)
            if not quota.blocks:
                continue
            if self._order is None:
                self._order = EpochOrder(quota.blocks, seed, halves=halves)
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


class Mixture(NamedTuple):
    """The slots of a mixture epoch: part after part, and in each part source by source.

    Attributes:
        slots: Slots of each source.
        parts: Number of parts. Each part has nearly the same share of the slots of every source.
    """

    slots: Mapping[str, int]
    parts: int

    def firsts(self, part: int) -> list[int]:
        """Return for each source the number of its slots before a part."""
        return [part * slots // self.parts for slots in self.slots.values()]

    def part_at(self, offset: int) -> int:
        """Return the part of a slot, given the number of slots before it."""
        return bisect_right(range(self.parts), offset, key=lambda part: sum(self.firsts(part))) - 1


class BlockOrder:
    """The endless stream of the blocks that a run reads: one mixture epoch after the other.

    Args:
        blocks: Blocks of each source; see [`BlockDataset.blocks_of`].
        history: Pairs of a mixture epoch and the quotas of all sources from then on. The first epoch is 0.
        seed: Each seed gives another order.
        spread_repeats: Keep two readings of a block apart. False is the order of runs from before December 2026, in
            which a mixture epoch is one part.
    """

    def __init__(
        self,
        blocks: Mapping[str, Sequence[range]],
        history: Sequence[tuple[int, Mapping[str, Quota]]],
        seed: int,
        spread_repeats: bool = True,
    ) -> None:
        self.seed, self.spread_repeats = seed, spread_repeats
        self._sources: dict[str, SourceOrder] = {}
        for name, ranges in blocks.items():
            own_history = [(epoch, quotas.get(name, Quota(0, 0))) for epoch, quotas in history]
            self._sources[name] = SourceOrder(ranges, f"{seed} {name}", own_history, halves=spread_repeats)

        # Per entry of the history: its first epoch and its slots.
        self._epochs: list[int] = []
        self._mixtures: list[Mixture] = []
        self._stages = Stages()
        for epoch, quotas in history:
            parts = PARTS * max(quota.repeats for quota in quotas.values()) if spread_repeats else 1
            slots = {name: quota.slots for name, quota in quotas.items()}
            self._epochs.append(epoch)
            self._mixtures.append(Mixture(slots, parts))
            self._stages.append(epoch, sum(slots.values()))

    def index(self, position: int) -> int:
        """Return the block at a position of the stream, counted from 0."""
        epoch, offset, _ = self._stages.locate(position)
        mixture = self._mixtures[bisect_right(self._epochs, epoch) - 1]
        part = mixture.part_at(offset)

        # Permute the slots of the part, which are numbered source by source.
        firsts = mixture.firsts(part)
        sizes = [stop - first for first, stop in zip(firsts, mixture.firsts(part + 1), strict=True)]
        ends = list(accumulate(sizes))
        key = _key(self.seed, f"{epoch} {part}" if self.spread_repeats else epoch)
        slot = permute(offset - sum(firsts), ends[-1], key)

        source = bisect_right(ends, slot)
        name = list(mixture.slots)[source]
        number = firsts[source] + slot - (ends[source] - sizes[source])
        return self._sources[name].block(epoch, number)

    def epoch(self, position: int) -> float:
        """Return the number of mixture epochs before a position: 1.5 in the middle of the second."""
        return self._stages.epoch(position)

    def position(self, epochs: float) -> int:
        """Return the first position with at least so many mixture epochs before it."""
        return self._stages.position(epochs)

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
