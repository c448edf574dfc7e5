"""Packed rows for attention that has no kernels for documents of different lengths.

TRL joins the packed rows of a batch to one, which suits flash attention: its kernels get the bounds of the documents.
All other implementations get a mask instead, and compute every pair of tokens. Joined, 16 rows of 256 tokens have 16
times as many pairs as apart.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedRowsCollator(DataCollatorForLanguageModeling):
    """Keeps the rows of a batch apart: (B, T) tokens, labels and position ids, which restart with every document.

    There is no attention mask: beside one, transformers does not look for documents in the position ids. The tokens
    that fill a row have position 0, so that each is a document of its own.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]
        batch["labels"][batch["position_ids"] == 0] = -100  # the end of a document does not predict the next one
        return batch


class PackedRowsTrainer(SFTTrainer):
    """Trains on packed rows as they are, unless attention uses the bounds of the documents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_free and not needs_one_row(self.model):
            self.data_collator = PackedRowsCollator(
                pad_token_id=self.data_collator.pad_token_id,
                pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
                return_position_ids=True,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Correct TRL's count of tokens, which expects one row."""
        before, positions = self._total_train_tokens, inputs.get("position_ids")
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if positions is not None and len(positions) > 1 and self.model.training:
            # Every document has at least two tokens, so each has one at position 1.
            tokens = (positions > 0).sum() + (positions == 1).sum()
            tokens = int(self.accelerator.gather_for_metrics(tokens).sum())
            self._total_train_tokens = before + tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


def needs_one_row(model: PreTrainedModel) -> bool:
    """Return whether attention gets the bounds of documents: flash attention, and layers of linear attention."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or []
    return "flash" in config._attn_implementation or "linear_attention" in layers
