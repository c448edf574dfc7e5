"""The order in which blocks are read, by address: which block stands at any position of an endless stream.

Every epoch is a permutation of all blocks, and none is ever stored: a block's place is computed, at the same cost for
the first block and for the hundred billionth. So a run goes on at any step without reading what came before it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

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
