"""Liger kernels for BuddyGPT models, switched on by transformers' own `use_liger_kernel: true`.

transformers looks up the model type in a table of liger-kernel and silently does nothing for an unknown type;
`register` adds "buddygpt" to that table. The kernels change the modules of one model, never the classes.
liger-kernel is imported only when it is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .losses_buddygpt import ChunkedCrossEntropy, rows_per_chunk
from .modeling_buddygpt import BuddyGPTAttention, BuddyGPTMLP, BuddyGPTRMSNorm

SWITCHES = ("rms_norm", "rope", "swiglu", "fused_linear_cross_entropy")  # keys of `liger_kernel_config`


def register() -> None:
    """Add "buddygpt" to Liger's table of model types.

    Raises:
        ImportError: liger-kernel or Triton is not installed.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore  optional

    MODEL_TYPE_TO_APPLY_LIGER_FN["buddygpt"] = apply_liger_kernel_to_buddygpt


def apply_liger_kernel_to_buddygpt(
    model: PreTrainedModel,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    fused_linear_cross_entropy: bool = True,
) -> None:
    """Make the modules of one model use Liger's kernels. Weights and their names do not change.

    Args:
        model: The model to change.
        rms_norm: Every RMSNorm.
        rope: Rotary embedding in grouped-query attention.
        swiglu: Dense feed-forward layers and shared experts (routed experts run as grouped matrix products).
        fused_linear_cross_entropy: The loss.
    """
    from liger_kernel.transformers.rms_norm import LigerRMSNorm  # pyright: ignore  optional
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore  optional
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP  # pyright: ignore  optional

    for module in model.modules():
        if rms_norm and isinstance(module, BuddyGPTRMSNorm):
            # Attributes that LigerRMSNorm.forward reads.
            module.variance_epsilon = module.eps
            module.offset = 0.0
            module.casting_mode = "llama"
            module.in_place = True
            module.row_mode = None
            use_forward(module, LigerRMSNorm.forward)
        if swiglu and isinstance(module, BuddyGPTMLP) and model.config.hidden_act in ("silu", "swish"):
            use_forward(module, LigerSwiGLUMLP.forward)
        if rope and isinstance(module, BuddyGPTAttention):
            module.apply_rotary_to_both = liger_rotary_pos_emb
    if fused_linear_cross_entropy:
        model.cross_entropy = liger_cross_entropy


def use_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the `forward` method of this module, not of its class."""
    module.forward = forward.__get__(module)


def liger_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss_coef: float, with_gradient: bool
) -> torch.Tensor:
    """Return what [`ChunkedCrossEntropy`] returns, computed by Liger's kernel.

    With a z-loss it calls [`ChunkedCrossEntropy`] itself, because Liger's loss would include the z-loss's value.
    """
    if z_loss_coef:
        return ChunkedCrossEntropy.apply(hidden_states, weight, targets, z_loss_coef, with_gradient)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # pyright: ignore  optional

    # Liger's default chunks have N x C / V rows: only a hundred or so for a narrow model with a large vocabulary, and
    # each chunk updates a gradient as large as the weight. `chunk_mem_const` makes its chunks as large as ours.
    logits_per_chunk = rows_per_chunk(hidden_states.device, weight.shape[0]) * weight.shape[0]
    chunk_mem_const = max(1, logits_per_chunk // hidden_states.numel())
    return liger_fused_linear_cross_entropy(
        hidden_states, weight, targets, reduction="sum", chunk_mem_const=chunk_mem_const
    )
