"""Blocks into batches that keep documents apart whatever runs the attention.

Eager, SDPA and flex attention find the documents from `position_ids`, provided that there is no attention mask; the
collator that `Trainer` takes by default adds one. Flash attention reads `position_ids` in batches of one row only, so
it is given the bounds.
"""

import torch
from torch.utils.data import default_collate


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
