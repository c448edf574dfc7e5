"""TRL's trainer for DPO on rows that are tokenized already, with an `sft` loss that does not depend on the batch."""

from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from buddygpt.cli.errors import UserError


class TokenizedDPOTrainer(DPOTrainer):
    """Takes rows that are tokenized already, whose answers end with their end mark (see data/chat/tokens.py).

    The loss `sft` is that of arXiv:2404.19733 (equation 2): the mean over pairs, and of each chosen answer the mean
    over its tokens. TRL's is the mean over the tokens of a micro-batch, so it depends on how pairs are batched.
    """

    def _prepare_dataset(self, dataset: Dataset, *_) -> Dataset:
        return dataset

    def _compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "sft" not in self.loss_types:
            return super()._compute_loss(model, inputs, return_outputs)
        seen: list[torch.Tensor] = []  # log-probabilities of the tokens, of each call of the model

        def model_that_keeps(**options: Any) -> Any:
            outputs = model(**options)
            seen.append(getattr(outputs, "log_probs", None))
            return outputs

        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        others = [term for term in terms if term[0] != "sft"]
        self.loss_types, self.loss_weights = [name for name, _ in others], [weight for _, weight in others]
        try:
            result = super()._compute_loss(model_that_keeps, inputs, return_outputs)
        finally:
            self.loss_types, self.loss_weights = map(list, zip(*terms, strict=True))
        mask = inputs["completion_mask"][:, 1:].chunk(2)[0]
        log_probs = seen[0][:, -mask.size(1) :].chunk(2)[0]
        means = -(log_probs * mask).sum(1) / mask.sum(1).clamp(min=1)
        loss = means.mean() * sum(weight for name, weight in terms if name == "sft")
        return (result[0] + loss, result[1]) if return_outputs else result + loss


def require_losses_that_go_together(args: DPOConfig) -> None:
    """Raise UserError for losses that TRL computes in another way than their names say, without a word."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    if args.use_weighting and "sft" in names:
        raise UserError("use_weighting weighs pairs, and loss_type sft has no pairs; remove one of them")
    sorting = [name for name in names if name.startswith("aot")]
    if sorting and args.per_device_train_batch_size == 1:
        raise UserError(
            f"loss_type {sorting[0]} sorts the pairs of a batch: per_device_train_batch_size must be at least 2"
        )
