"""What a model is trained on: blocks of tokens, read from the shards one by one, and batches of them.

Batches keep documents apart whatever runs the attention. Eager, SDPA and flex attention find the documents from
`position_ids`, provided that there is no attention mask; the collator that `Trainer` takes by default adds one. Flash
attention reads `position_ids` in batches of one row only, so it is given the bounds.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import TokenShards


class BlockDataset(TokenShards, Dataset):
    """Blocks of `block_size` tokens, cut from the shards as if they were one file; what is left at the end is dropped.

    A block is read from disk when it is asked for, and nothing but that block: opening costs the same for any size of
    data, workers share no state, and block `i` is the same in every run.

    Args:
        folder: A folder of token shards.
        block_size: Tokens in a block.
        isolate_documents: Add `position_ids` that begin again at 0 after every separator, from which attention is
            kept inside documents.
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
        """The blocks of each source: those that begin in its shards, a range for each of these.

        Where shards are added at the end, blocks are added at the ends of these lists, and nothing else changes.
        """
        starts = [-(-start // self.block_size) for start in (0, *self._ends.tolist())]
        ranges: dict[str, list[range]] = {}
        for shard, (first, stop) in zip(self.shards, pairwise(starts), strict=True):
            ranges.setdefault(shard["source"], []).append(range(first, min(stop, len(self))))
        return ranges

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels` (the same), and `position_ids` if asked for: int64, (block_size,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        tokens = self._read(index * self.block_size, self.block_size)
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        block = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.isolate_documents:
            block["position_ids"] = self._positions(input_ids)
        return block

    def _read(self, start: int, count: int) -> np.ndarray:
        pieces = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            begin = start - (self._ends[shard] - self.shards[shard]["tokens"])
            size = min(count, int(self._ends[shard]) - start)
            path = self.folder / self.shards[shard]["file"]
            pieces.append(np.fromfile(path, self.dtype, size, offset=int(begin) * self.dtype.itemsize))
            start, count, shard = start + size, count - size, shard + 1
        return np.concatenate(pieces)

    def _positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        index = torch.arange(self.block_size)
        is_first = torch.cat([torch.tensor([True]), input_ids[:-1] == self.eos_id])
        return index - torch.where(is_first, index, 0).cummax(0).values


def collate_blocks(blocks: list[dict[str, torch.Tensor]], with_bounds: bool = False) -> dict[str, torch.Tensor | int]:
    """Stack blocks of T tokens into (B, T). `with_bounds` adds, from the `position_ids`, what flash attention's kernel
    of variable lengths takes, as transformers names it."""
    batch = default_collate(blocks)
    return batch | document_bounds(batch["position_ids"]) if with_bounds else batch


def document_bounds(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Where documents begin and end in the flattened batch, (documents + 1,), and how long the longest is.

    Args:
        position_ids: (B, T), 0 at the first token of each row and of each document.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([position_ids.numel()]))).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
