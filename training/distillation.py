"""Distillation from stored predictions of a teacher, and the checks that teacher and student fit together."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from buddygpt.cli.errors import UserError
from buddygpt.training.packed_rows import PackedRowsTrainer
from buddygpt.training.teacher_targets import IGNORED, StoredTargets, Targets

CHUNK = 2048  # tokens whose logits exist at once
LOGIT_CHANGES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier", "final_logit_softcapping")


class StoredTeacherTrainer(PackedRowsTrainer):
    """Minimizes (1 - `label_weight`) x KL(teacher || student) + `label_weight` x cross-entropy of the labels.

    The labels of `train_dataset` are numbers of targets (see [`number_targets`]); those of `eval_dataset` are tokens,
    and `eval_loss` is the cross-entropy, comparable with that of sft/sft.py.

    Args:
        targets: The teacher's predictions.
        label_weight: From 0 to 1.
    """

    def __init__(self, *args, targets: StoredTargets, label_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.targets = targets
        self.label_weight = label_weight
        self.hidden_states: torch.Tensor | None = None
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            raise UserError(
                "stored targets need the whole output head, which ZeRO-3 and FSDP shard: use "
                "accelerate_configs/zero2.yaml"
            )
        self.student = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.student.base_model.register_forward_hook(self.keep_hidden_states)

    def keep_hidden_states(self, backbone, args, output) -> None:
        self.hidden_states = output.last_hidden_state

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        numbers = inputs["labels"]
        labels = torch.where(numbers == IGNORED, IGNORED, inputs["input_ids"])
        nll = super().compute_loss(model, {**inputs, "labels": labels}, False, num_items_in_batch)

        predicted = numbers[:, 1:]
        has_target = predicted != IGNORED
        hidden_states = self.hidden_states[:, :-1][has_target]
        self.hidden_states = None
        targets = self.targets.read(predicted[has_target])
        divergence = sparse_divergence(hidden_states, self.student.get_output_embeddings(), targets).sum()
        divergence = divergence / (len(hidden_states) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:  # as the other loss
            divergence = divergence * self.accelerator.num_processes
        return (1 - self.label_weight) * divergence + self.label_weight * nll


def sparse_divergence(hidden_states: torch.Tensor, head: nn.Module, targets: Targets) -> torch.Tensor:
    """Return the KL divergence of the student from each target: unbiased, or exact if the target has all tokens.

    Args:
        hidden_states: Those that predict the tokens of the targets, (targets, width).
        head: The student's output head.
        targets: Of the teacher.
    """

    def cross_entropy(hidden_states: torch.Tensor, token_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = head(hidden_states).float()
        log_probs = logits.gather(-1, token_ids.long()) - logits.logsumexp(-1, keepdim=True)
        return -(weights.float() * log_probs).sum(-1)

    losses = []
    for start in range(0, len(hidden_states), CHUNK):
        part = slice(start, start + CHUNK)
        inputs = hidden_states[part], targets.token_ids[part], targets.weights[part]
        losses.append(checkpoint(cross_entropy, *inputs, use_reentrant=False) - targets.entropy[part])
    return torch.cat(losses) if losses else hidden_states.sum(-1)


def require_plain_head(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError if the model changes its logits after the output head."""
    for key in LOGIT_CHANGES:
        if getattr(config.get_text_config(), key, None) not in (None, 1, 1.0):
            raise UserError(
                f"{name} changes its logits ({key}), which stored targets do not support: use another student"
            )


def require_same_vocabulary(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    remedy: str = "Use a teacher of the same tokenizer",
) -> None:
    """Raise UserError, naming what differs, unless both tokenizers give every token the same id."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    odd = sorted((token for token in theirs | ours if theirs.get(token) != ours.get(token)), key=len)
    ids = [f"{vocabulary[odd[0]]}" if odd[0] in vocabulary else "missing" for vocabulary in (theirs, ours)]
    raise UserError(
        f"the teacher {teacher.name_or_path} has another vocabulary than the student {student.name_or_path}: "
        f"{len(theirs):,} and {len(ours):,} tokens, {len(odd):,} differ, first {odd[0]!r} "
        f"(id {ids[0]} and {ids[1]}). {remedy}"
    )
