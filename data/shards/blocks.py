"""Blocks of tokens, read one by one from the shards, and batches of blocks.

Attention stays inside documents with every implementation. Eager, SDPA and flex attention find the documents from
`position_ids`, if the batch has no attention mask; `Trainer`'s default collator would add one. Flash attention reads
`position_ids` only in batches of one row, so larger batches carry the bounds of the documents.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import TokenShards
from buddygpt.data.shards.order import BlockOrder


class BlockDataset(TokenShards, Dataset):
    """Blocks of `block_size` tokens, cut from the shards as if they were one file.

    The remainder at the end is dropped. Each access reads only the requested block from disk. So opening takes the
    same time for any amount of data, workers share no state, and block `i` is the same in every run.

    Args:
        folder: A folder of token shards.
        block_size: Tokens in a block.
        isolate_documents: Add `position_ids` that restart at 0 after every separator, to keep attention inside
            documents.
        source: As in [`TokenShards`].

    Raises:
        UserError: As [`TokenShards`], or the shards hold less than one block.
    """

    def __init__(
        self, folder: str | Path, block_size: int, isolate_documents: bool = False, source: str | None = None
    ) -> None:
        super().__init__(folder, source)
        self.block_size = block_size
        self.isolate_documents = isolate_documents
        self._ends = np.cumsum([shard["tokens"] for shard in self.shards])
        if len(self) == 0:
            raise UserError(f"{folder} holds {self.tokens} tokens, less than one block of {block_size}; add text")

    def __len__(self) -> int:
        return self.tokens // self.block_size

    @property
    def blocks_of(self) -> dict[str, list[range]]:
        """The blocks of each source, one range per shard: those whose first token lies in that shard.

        Appending shards adds ranges at the end of these lists and changes none.
        """
        # The number of the first block that begins at or after the start of each shard, and after the last shard.
        firsts = [0]
        for end in self._ends.tolist():
            firsts.append(-(-end // self.block_size))  # rounded up
        ranges: dict[str, list[range]] = {}
        for shard, (first, stop) in zip(self.shards, pairwise(firsts), strict=True):
            ranges.setdefault(shard["source"], []).append(range(first, min(stop, len(self))))
        return ranges

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, equal `labels`, and `position_ids` if documents are isolated: int64, (block_size,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        tokens = self._read(index * self.block_size, self.block_size)
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        block = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.isolate_documents:
            block["position_ids"] = self._positions(input_ids)
        return block

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start` of all shards in a row."""
        pieces = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            shard, shard_end = self.shards[number], int(self._ends[number])
            begin = start - (shard_end - shard["tokens"])
            size = min(count, shard_end - start)
            path = self.folder / shard["file"]
            pieces.append(np.fromfile(path, self.dtype, size, offset=begin * self.dtype.itemsize))
            start += size
            count -= size
            number += 1
        return np.concatenate(pieces)

    def _positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the distance of each token from the first token of its document or of the block."""
        index = torch.arange(self.block_size)
        is_first = torch.cat([torch.tensor([True]), input_ids[:-1] == self.eos_id])
        document_start = torch.where(is_first, index, 0).cummax(0).values
        return index - document_start


class BlockStream(Dataset):
    """All blocks that a run reads: item `p` is the block at position `p` of the order.

    Args:
        blocks: The data set that the blocks are read from.
        order: Its order.
        length: Blocks that the run reads: steps x blocks in a step.
    """

    def __init__(self, blocks: BlockDataset, order: BlockOrder, length: int) -> None:
        self.blocks = blocks
        self.order = order
        self.length = length
        self.block_size = blocks.block_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return the block as [`BlockDataset`] does."""
        return self.blocks[self.order.index(position)]


def collate_blocks(blocks: list[dict[str, torch.Tensor]], with_bounds: bool = False) -> dict[str, torch.Tensor | int]:
    """Stack blocks of T tokens into tensors of shape (B, T).

    Args:
        blocks: Items of a [`BlockDataset`].
        with_bounds: Add what [`document_bounds`] returns.
    """
    batch = default_collate(blocks)
    if with_bounds:
        batch.update(document_bounds(batch["position_ids"]))
    return batch


def document_bounds(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Return the arguments of flash attention's variable-length kernel, as transformers names them.

    `cu_seq_lens_*` are the document bounds in the flattened batch: int32, (documents + 1,). `max_length_*` is the
    length of the longest document.

    Args:
        position_ids: (B, T), 0 at the first token of each row and of each document.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([position_ids.numel()]))).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
