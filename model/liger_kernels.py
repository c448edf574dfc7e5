"""Liger's kernels for a BuddyGPT model, through transformers' own switch `use_liger_kernel: true`.

transformers asks a table of liger-kernel by model type, and does nothing for a type that it lacks; `register` enters
"buddygpt". One model is changed, not its classes. The package is imported when it is asked for.
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
    """Enter "buddygpt" into Liger's table. Raises ImportError where liger-kernel or Triton is missing."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN["buddygpt"] = apply_liger_kernel_to_buddygpt


def apply_liger_kernel_to_buddygpt(
    model: PreTrainedModel,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    fused_linear_cross_entropy: bool = True,
) -> None:
    """Give the modules of one model Liger's kernels: every RMSNorm, RoPE of grouped-query attention, SwiGLU layers and
    shared experts (not the routed ones, which grouped products run), and the loss head. Weights and names stay."""
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    for module in model.modules():
        if rms_norm and isinstance(module, BuddyGPTRMSNorm):
            module.variance_epsilon = module.eps
            module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
            bind(module, LigerRMSNorm.forward)
        if swiglu and isinstance(module, BuddyGPTMLP) and model.config.hidden_act in ("silu", "swish"):
            bind(module, LigerSwiGLUMLP.forward)
        if rope and isinstance(module, BuddyGPTAttention):
            module.apply_rotary_to_both = liger_rotary_pos_emb
    if fused_linear_cross_entropy:
        model.cross_entropy = liger_cross_entropy


def bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let this one module, not its class, run `forward`."""
    module.forward = forward.__get__(module)


def liger_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss_coef: float, with_gradient: bool
) -> torch.Tensor:
    """[`ChunkedCrossEntropy`] by Liger's kernel, where there is no z-loss, whose value Liger would show as loss.

    Liger's own chunks have N x C / V rows, a hundred or so for a narrow model with a large vocabulary, and each adds
    to a gradient as large as the weight: `chunk_mem_const` makes them as large as ours.
    """
    if z_loss_coef:
        return ChunkedCrossEntropy.apply(hidden_states, weight, targets, z_loss_coef, with_gradient)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    logits = rows_per_chunk(hidden_states.device, weight.shape[0]) * weight.shape[0]
    budget = max(1, logits // hidden_states.numel())
    return liger_fused_linear_cross_entropy(hidden_states, weight, targets, reduction="sum", chunk_mem_const=budget)
