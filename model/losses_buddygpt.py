"""The losses of a BuddyGPT model: cross entropy without all logits in memory, and the balance loss of the experts.

This file is copied into every checkpoint together with the model.

Shapes in the comments: B batch size, T tokens of a row, N tokens of the batch (B x T), C hidden_size, V vocab_size,
E experts, k experts per token.
"""

import torch
from torch.autograd.function import once_differentiable

from .configuration_buddygpt import BuddyGPTConfig

IGNORE_INDEX = -100  # the label of tokens that do not count


def rows_per_chunk(device: torch.device, vocab_size: int) -> int:
    """Return how many rows of logits to hold at once: 64 MiB of float32 on a CPU, 1 GiB on a GPU.

    A GPU needs more because small matrix products do not fill it.
    """
    logits = 2**24 if device.type == "cpu" else 2**28
    return max(1, logits // vocab_size)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of the logits `hidden_states @ weight.T`, summed over rows, computed a chunk of rows at a time.

    The forward pass also computes the gradient, while a chunk's logits exist; so logits are neither kept nor computed
    twice (as in Liger Kernel, arXiv:2410.10989 section 3.2). Unlike `torch.nn.functional.linear_cross_entropy` it sums
    over chunks in float32 under autocast, and it has a z-loss (PaLM, arXiv:2204.02311 section 5):
    z_loss_coef x logsumexp(logits)^2, which adds to the gradient, not to the value.
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
        """Return the summed cross entropy, a float32 scalar.

        Args:
            hidden_states: (N, C).
            weight: Weight of the output head (V, C).
            targets: Token ids (N,), -100 at rows that do not count.
            z_loss_coef: Weight of the z-loss.
            with_gradient: Compute the gradient. Give False under `torch.no_grad()`, which this function cannot
                see by itself.
        """
        device = hidden_states.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        else:
            dtype = hidden_states.dtype
        needs_grad_hidden = with_gradient and ctx.needs_input_grad[0]
        needs_grad_weight = with_gradient and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_states) if needs_grad_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_grad_weight else None

        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=device)
        rows = min(rows_per_chunk(device, weight.shape[0]), hidden_states.shape[0])
        logits_buffer = torch.empty((rows, weight.shape[0]), dtype=dtype, device=device)  # every chunk reuses it
        for start in range(0, hidden_states.shape[0], rows):
            x = hidden_states[start : start + rows].to(dtype)  # (rows, C)
            target = targets[start : start + rows]
            is_counted = target != IGNORE_INDEX
            # Index of each row's target logit. Rows that do not count point at logit 0 and are multiplied by 0.
            position = (torch.arange(len(target), device=device), target.clamp(min=0))

            # Loss of a row: logsumexp(logits) - target logit. Subtracting the largest logit keeps exp() finite. The
            # in-place steps turn one (rows, V) tensor from logits into exponentials.
            logits = torch.mm(x, head.T, out=logits_buffer[: len(x)]).float()
            largest = logits.amax(-1, keepdim=True)
            target_logit = logits[position]
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(-1)
            logsumexp = sums.log() + largest.squeeze(-1)
            total += ((logsumexp - target_logit) * is_counted).sum()
            if not (needs_grad_hidden or needs_grad_weight):
                continue

            # d loss / d logits = softmax - one_hot(target), plus 2 x z_loss_coef x logsumexp x softmax for the z-loss.
            softmax_factor = is_counted * (1 + 2 * z_loss_coef * logsumexp) / sums
            gradient = exponentials.mul_(softmax_factor.unsqueeze(-1))
            gradient[position] -= is_counted.float()
            gradient = gradient.to(dtype)
            if needs_grad_hidden:
                grad_hidden[start : start + rows] = gradient @ head
            if needs_grad_weight:
                if weight.dtype == dtype:
                    grad_weight.addmm_(gradient.T, x)
                else:  # autocast: the product is in bfloat16, the sum over chunks in float32
                    grad_weight += gradient.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: torch.Tensor):
        """Scale the gradients that `forward` computed.

        In place, because a second copy of the weight's gradient would raise the peak of memory. Autograd notices the
        change and refuses a second backward pass.
        """
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight.mul_(grad_total)
        return grad_hidden, grad_weight, None, None, None  # one per argument of `forward`


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
    """Return the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437 eq. 17-20) of the routing that was used.

    For each row and layer it is E / k times the sum over the experts of

        (share of the row's tokens that chose the expert) x (mean score of the expert)

    with each token's scores scaled to sum to 1. It is 1 if all experts are used equally. Layers are summed. Rows are
    weighted by their number of labels, as in the language model's loss, so that accumulated batches add up to the loss
    of the whole batch.

    Args:
        router_logits, router_indices: (N, E) and (N, k) for each MoE layer.
        labels: (B, T).
        attention_mask: (B, T), 0 on padding, which does not count; or None.
        num_items_in_batch, shift_labels: As in [`BuddyGPTForCausalLM.forward`].
    """
    # Weight of each row: its share of the labels that count.
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    items = (targets != IGNORE_INDEX).sum(1)  # (B,)
    if num_items_in_batch is None:
        num_items_in_batch = items.sum().clamp(min=1)
    row_weights = items / num_items_in_batch

    # Weight of each token in its row's means: 0 on padding, else 1 / tokens of the row.
    is_token = torch.ones_like(labels) if attention_mask is None else attention_mask
    token_weights = is_token / is_token.sum(1, keepdim=True).clamp(min=1)
    token_weights = token_weights.unsqueeze(-1)  # (B, T, 1)

    total = row_weights.new_zeros(())
    for logits, indices in zip(router_logits, router_indices, strict=True):
        scores = expert_scores(logits, config.scoring_func)
        probabilities = scores / scores.sum(-1, keepdim=True)  # (N, E)
        # E / k at the chosen experts, 0 elsewhere; no gradient flows through the choice.
        chosen = torch.zeros_like(probabilities).scatter(1, indices, config.n_routed_experts / indices.shape[1])
        # Means over the tokens of each row: (N, E) -> (B, T, E) -> (B, E)
        share = (chosen.unflatten(0, labels.shape) * token_weights).sum(1)
        mean_score = (probabilities.unflatten(0, labels.shape) * token_weights).sum(1)
        total = total + (row_weights * (share * mean_score).sum(-1)).sum()
    return total
