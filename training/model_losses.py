"""Apply the model's own balance loss and z-loss in TRL's trainers, which replace the model's forward pass."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from buddygpt.cli.errors import UserError
from buddygpt.model.losses_buddygpt import load_balancing_loss
from buddygpt.training.callbacks.experts import find_routers

TRAINERS = (SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer)  # they replace the model's forward pass


def add_model_losses(trainer: Trainer) -> None:
    """Make `aux_loss_alpha` and `z_loss_coef` of the model's config effective, if the trainer ignores them.

    As in the model's own forward pass, they add to the gradient and not to the reported loss.

    Raises:
        UserError: One of the two cannot be applied in this run.
    """
    config = trainer.model.config
    aux_loss_alpha, z_loss_coef = getattr(config, "aux_loss_alpha", 0), getattr(config, "z_loss_coef", 0)
    if aux_loss_alpha and (trainer.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise UserError(
            f"aux_loss_alpha ({aux_loss_alpha}) of the model has no gradient under use_reentrant: true; remove that"
        )
    reads_logits = "chosen_input_ids" in getattr(trainer.train_dataset, "column_names", ())  # trl.experimental
    if isinstance(trainer, RewardTrainer):
        reads_logits, z_loss_coef = True, 0  # it has no output head
    if not (isinstance(trainer, TRAINERS) or reads_logits) or not (aux_loss_alpha or z_loss_coef):
        return
    if z_loss_coef and (is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled):
        raise UserError(
            f"z_loss_coef ({z_loss_coef}) of the model cannot be applied here, because ZeRO-3 and FSDP shard the "
            "output head: use accelerate_configs/zero2.yaml, or set model_init_kwargs: {z_loss_coef: 0}"
        )

    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    call = record_calls(model, reads_logits)
    compute_trl_loss = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        call.clear()
        result = compute_trl_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if "outputs" not in call:  # an evaluation
            return result
        extra = 0.0
        if aux_loss_alpha:
            extra = extra + aux_loss_alpha * balance_loss(call, config, num_items_in_batch)
        if z_loss_coef:
            extra = extra + z_loss_coef * z_loss(call, num_items_in_batch, getattr(trainer, "temperature", 1.0))
        # TRL's loss has the same factor: `num_items_in_batch` counts the tokens of all processes, whose gradients are
        # averaged.
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            extra = extra * trainer.accelerator.num_processes
        if num_items_in_batch is None and getattr(trainer, "loss_is_scaled_for_ga", None):  # so it is in GRPO
            extra = extra / trainer.current_gradient_accumulation_steps
        extra = extra - extra.detach()
        return (result[0] + extra, *result[1:]) if return_outputs else result + extra

    trainer.compute_loss = compute_loss


def record_calls(model: nn.Module, reads_logits: bool = False) -> dict[str, Any]:
    """Return a dictionary that receives the arguments, router outputs, hidden states and outputs of a training call.

    Calls without gradients, such as those of a reference model, are not recorded.

    Args:
        reads_logits: The trainer calls the model without labels and computes its loss from the logits. Then every
            token that is no padding counts.
    """
    call: dict[str, Any] = {}

    def is_open() -> bool:  # checkpointing runs the layers again in the backward pass
        return "labels" in call and "outputs" not in call

    def open_call(model, args, kwargs) -> None:
        if torch.is_grad_enabled() and kwargs.get("fused_lm_head"):
            call.update(kwargs, output_head=model.get_output_embeddings(), routed=[])
        elif torch.is_grad_enabled() and reads_logits:
            ids, mask = args[0] if args else kwargs["input_ids"], kwargs["attention_mask"]
            call.update(attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), routed=[])

    def record_router(router, args, output) -> None:
        if is_open():
            call["routed"].append((output[0], output[2]))  # logits and indices

    def record_hidden_states(backbone, args, output) -> None:
        if is_open():
            call["hidden_states"] = output.last_hidden_state

    def close_call(model, args, output) -> None:
        if is_open():
            call["outputs"] = output

    model.register_forward_pre_hook(open_call, with_kwargs=True)
    model.register_forward_hook(close_call)
    model.base_model.register_forward_hook(record_hidden_states)
    for router in find_routers(model):
        router.register_forward_hook(record_router)
    return call


def balance_loss(call: dict[str, Any], config, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    logits, indices = zip(*call["routed"], strict=True)
    return load_balancing_loss(
        logits,
        indices,
        call["labels"],
        call.get("attention_mask"),
        config,
        num_items_in_batch,
        call.get("shift_labels"),
    )


def z_loss(
    call: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, temperature: float = 1.0
) -> torch.Tensor:
    """Return the mean of logsumexp(logits / temperature)^2 over the tokens that count.

    TRL's outputs have no logsumexp, but the log-probability of a label is its logit - logsumexp.
    """
    outputs, hidden_states, labels = call["outputs"], call["hidden_states"], call.get("shift_labels")
    if "output_head" not in call:  # the logits are there
        logits = outputs.logits[:, :-1][call["labels"][:, 1:] != -100].float()
        return logits.logsumexp(-1).square().mean()
    if labels is None:
        hidden_states, labels = hidden_states[:, :-1], call["labels"][:, 1:]
    counted = outputs.label_mask
    label_weights = call["output_head"].weight[labels[counted]]  # (N, C)
    label_logits = (hidden_states[counted].float() * label_weights.float()).sum(-1)
    logsumexp = label_logits / temperature - outputs.log_probs[counted]
    items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return logsumexp.square().sum() / items
