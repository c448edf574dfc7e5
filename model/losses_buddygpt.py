"""What a BuddyGPT model minimises: cross entropy without a table of all logits, and the balance of experts.

Copied into every checkpoint with the model. Shapes: B batch, T tokens of a row, N rows of logits, C hidden_size,
V vocab_size, E experts, k experts per token.
"""

import torch
from torch.autograd.function import once_differentiable

from .configuration_buddygpt import BuddyGPTConfig


def rows_per_chunk(device: torch.device, vocab_size: int) -> int:
    """Rows of logits that exist at once: 64 MiB of float32, 1 GiB where a small product does not fill the device."""
    return max(1, (2**24 if device.type == "cpu" else 2**28) // vocab_size)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of the logits `hidden_states @ weight.T`, summed over rows, some rows at a time.

    The gradient is made with the loss while a chunk's logits exist, so that none are kept and no product is done twice
    (as in Liger Kernel, arXiv:2410.10989 section 3.2). Unlike `torch.nn.functional.linear_cross_entropy` the sums over
    chunks are in float32 under autocast, and there is a z-loss (PaLM, arXiv:2204.02311 section 5): z_loss_coef x
    logsumexp(logits)^2, which reaches the gradient, not the value.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        z_loss_coef: float = 0.0,
        with_gradient: bool = True,
    ) -> torch.Tensor:
        """Hidden states (N, C), weight (V, C) and targets (N,), -100 where no loss is wanted -> float32 scalar."""
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=device)
        rows = min(rows_per_chunk(device, weight.shape[0]), hidden_states.shape[0])
        products = torch.empty((rows, weight.shape[0]), dtype=dtype, device=device)
        for start in range(0, hidden_states.shape[0], rows):
            x, target = hidden_states[start : start + rows].to(dtype), targets[start : start + rows]
            counted, position = target != -100, (torch.arange(len(target), device=device), target.clamp(min=0))
            logits = torch.mm(x, head.T, out=products[: len(x)]).float()
            largest = logits.amax(-1, keepdim=True)
            target_logit = logits[position]
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(-1)
            normaliser = sums.log() + largest.squeeze(-1)
            total += ((normaliser - target_logit) * counted).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits: softmax - one-hot, and of the z-loss 2 z logsumexp softmax
            gradient = exponentials.mul_((counted * (1 + 2 * z_loss_coef * normaliser) / sums).unsqueeze(-1))
            gradient[position] -= counted.float()
            gradient = gradient.to(dtype)
            if needs_hidden:
                grad_hidden[start : start + rows] = gradient @ head
            if needs_weight and weight.dtype == dtype:
                grad_weight.addmm_(gradient.T, x)
            elif needs_weight:
                grad_weight += gradient.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: torch.Tensor):
        # In place: a second copy as large as the weight would be the peak of memory. Autograd refuses a second pass.
        return *(None if each is None else each.mul_(grad_total) for each in ctx.saved_tensors), None, None, None


def expert_scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """(..., E) router logits -> scores in (0, 1)."""
    return logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    router_indices: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: BuddyGPTConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437 eq. 17-20) of the routing that took place.

    For each row and layer, E / k x the sum over the experts of (share of the row's tokens that chose the expert) x
    (mean score of the expert, where a token's scores sum to 1): 1 if all experts are used alike. Summed over layers.
    Rows weigh as in the language model's loss, by their labels, so that accumulated steps add up to the whole batch.

    Args:
        router_logits, router_indices: For each MoE layer (B x T, E) and (B x T, k).
        labels: (B, T).
        attention_mask: (B, T), 0 on padding, which is not counted; or None.
        num_items_in_batch, shift_labels: As in [`BuddyGPTForCausalLM.forward`].
    """
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    items = (targets != -100).sum(1)
    row_weights = items / (items.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    real = torch.ones_like(labels) if attention_mask is None else attention_mask
    token_weights = (real / real.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)  # (B, T, 1)
    total = row_weights.new_zeros(())
    for logits, indices in zip(router_logits, router_indices, strict=True):
        scores = expert_scores(logits, config.scoring_func)
        probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = torch.zeros_like(probabilities).scatter(1, indices, config.n_routed_experts / indices.shape[1])
        share, mean_score = (
            (each.unflatten(0, labels.shape) * token_weights).sum(1) for each in (chosen, probabilities)
        )
        total = total + (row_weights * (share * mean_score).sum(-1)).sum()
    return total
