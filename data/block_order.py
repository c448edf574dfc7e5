"""The order in which blocks are read, by address: which block stands at any position of an endless stream.

Every epoch is a permutation of all blocks, and none is ever stored: a block's place is computed, at the same cost for
the first block and for the hundred billionth. So a run goes on at any step without reading what came before it, and
data may be added to it on the way.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.data import Dataset

from buddygpt.launch import UserError, file_sha256

from .token_shards import MANIFEST, BlockDataset

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


class BlockOrder:
    """An endless stream of blocks: epoch after epoch, each in another order that follows from the seed.

    Args:
        num_blocks: Blocks there are, and that every epoch ranges over.
        seed: Another seed, another order.
        growth: Where data was added: pairs of an epoch and the number of blocks it and all later ones range over.
    """

    def __init__(self, num_blocks: int, seed: int, growth: Sequence[tuple[int, int]] = ()) -> None:
        if num_blocks < 1:
            raise ValueError(f"an order needs at least one block, not {num_blocks}")
        self.seed = seed
        self._epochs, self._sizes, self._starts = [0], [num_blocks], [0]
        for epoch, blocks in growth:
            if epoch < self._epochs[-1] or blocks < self._sizes[-1]:
                raise ValueError(f"growth {list(growth)}: epochs and blocks only increase")
            self._starts.append(self._starts[-1] + (epoch - self._epochs[-1]) * self._sizes[-1])
            self._epochs.append(epoch)
            self._sizes.append(blocks)

    def index(self, position: int) -> int:
        """Return the block at a position of the stream, from 0 on."""
        if position < 0:
            raise IndexError(f"position {position}")
        segment = bisect_right(self._starts, position) - 1
        epoch, offset = divmod(position - self._starts[segment], self._sizes[segment])
        return permute(offset, self._sizes[segment], _key(self.seed, self._epochs[segment] + epoch))

    def epoch(self, position: int) -> float:
        """Return how many epochs lie before a position: 1.5 in the middle of the second."""
        segment = bisect_right(self._starts, position) - 1
        return self._epochs[segment] + (position - self._starts[segment]) / self._sizes[segment]

    def position(self, epochs: float) -> int:
        """Return the first position that has at least so many epochs before it."""
        segment = bisect_right(self._epochs, epochs) - 1
        return self._starts[segment] + math.ceil((epochs - self._epochs[segment]) * self._sizes[segment])

    def which_blocks(self, step: int, global_batch: int) -> list[int]:
        """Return the blocks that a step reads, in the order of the stream.

        Process p of P reads, as its m-th micro-batch of b blocks, those from (m P + p) b on.

        Args:
            step: As it is logged: 1 is the first.
            global_batch: Blocks in a step: per device x accumulation x processes.
        """
        return [self.index(position) for position in range((step - 1) * global_batch, step * global_batch)]


@lru_cache(maxsize=64)
def _key(seed: int, epoch: int) -> bytes:
    return blake2b(f"{seed} {epoch}".encode()).digest()


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
    """Return which shards a run ranges over, and from which epoch on, with what was added to them since.

    New shards may follow the ones there were. The epoch that has begun is read to its end as it was promised; all
    later ones range over everything.

    Args:
        history: As an earlier call returned it, from the run card; empty at the beginning of a run.
        blocks: The data as it is now.
        step: Steps taken before.
        global_batch: Blocks in a step.

    Returns:
        One entry per state of the data: `step` at which it was found; `epoch`, the first that ranges over it;
        `blocks`, how many there are; `manifest_sha256`; and of every new shard `file`, `tokens` and `sha256`.

    Raises:
        UserError: A shard that the run has ranged over is missing, was changed or stands elsewhere in the list.
    """
    known = [shard for entry in history for shard in entry["shards"]]
    found = [{key: shard[key] for key in ("file", "tokens", "sha256")} for shard in blocks.shards]
    for number, (before, now) in enumerate(zip_longest(known, found[: len(known)])):
        if before != now:
            raise UserError(
                f"cannot resume on {blocks.folder / MANIFEST}: shard {number} of the run was {_shown(before)}, "
                f"now it is {_shown(now)}. Data can only be added after what was there: bring it back, or give "
                "another --output_dir"
            )
    if history and len(found) == len(known):
        return history
    entry = {
        "step": step,
        "epoch": math.ceil(make_order(history, 0).epoch(step * global_batch)) if history else 0,
        "blocks": len(blocks),
        "manifest_sha256": file_sha256(blocks.folder / MANIFEST),
        "shards": found[len(known) :],
    }
    return [*history, entry]


def make_order(history: list[dict[str, Any]], seed: int) -> BlockOrder:
    """Return the order over the data that [`update_history`] describes."""
    return BlockOrder(history[0]["blocks"], seed, [(entry["epoch"], entry["blocks"]) for entry in history[1:]])


def _shown(shard: dict[str, Any] | None) -> str:
    return f"{shard['file']} (sha256 {shard['sha256'][:12]})" if shard else "missing"
