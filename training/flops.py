"""FLOPs per token of a model and peak FLOP/s of a GPU, which together define MFU.

    MFU = FLOPs per token x tokens per second / (devices x peak of one device)

MFU is model FLOPs utilization (arXiv:2204.02311 appendix B). Needs torch, transformers and PyYAML only.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

GPUS_FILE = Path(__file__).with_name("gpus.yaml")

# Suffixes of a different card, whose peak is not that of the name before the suffix.
_OTHER_CARD = r"(?! (Ti|SUPER|D|Laptop|Mobile|with Max-Q|MIG))"


@dataclass(frozen=True)
class GpuSpec:
    """One entry of gpus.yaml.

    Attributes:
        name: Its name in `torch.cuda.get_device_name()`, without "NVIDIA", "Tesla" and "GeForce".
        memory_gib: Total memory in GiB, one number per version that was sold.
        peak_tflops: Dense tensor-core TFLOP/s in 16 bits.
        bf16: Whether the tensor cores multiply bfloat16; if not, the peak is for float16 only.
    """

    name: str
    memory_gib: tuple[float, ...]
    peak_tflops: float
    bf16: bool


@cache
def load_gpus() -> dict[str, GpuSpec]:
    """Return the GPUs of gpus.yaml by name, in the order of the file."""
    entries = yaml.safe_load(GPUS_FILE.read_text(encoding="utf-8"))
    gpus = {}
    for name, entry in entries.items():
        memory = tuple(float(size) for size in entry["memory_gib"])
        gpus[name] = GpuSpec(name, memory, entry["peak_tflops"], entry["bf16"])
    return gpus


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device in dense products of `dtype`, or None if it is unknown.

    Args:
        device_name: The result of `torch.cuda.get_device_name()`. The longest name of gpus.yaml inside it counts.
        dtype: Type that the products are computed in; only bfloat16 and float16 are known.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    best: GpuSpec | None = None
    for gpu in load_gpus().values():
        if not gpu.bf16 and dtype is torch.bfloat16:
            continue
        found = re.search(rf"\b{gpu.name}\b{_OTHER_CARD}", device_name, re.IGNORECASE)
        if found and (best is None or len(gpu.name) > len(best.name)):
            best = gpu
    return None if best is None else best.peak_tflops * 1e12


def flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """Return the training FLOPs per token: the forward pass, and twice as much for the backward pass.

        6 x matrix parameters + 6 x layers x heads x (width of a query or key + width of a value) x length

    - Matrix parameters: every matrix that a token is multiplied with. The output head counts once, tied or not; the
      embedding does not count, because it is a lookup. Of the routed experts, `num_experts_per_tok` count. Routers,
      shared experts and all experts of a soft mixture count in full.
    - Attention as if each token saw all `length` tokens of its row: not halved for causality (as in PaLM, Megatron and
      nanoGPT), and not cut at document ends if attention is kept inside documents.
    - Recomputation (gradient checkpointing), norms, activations and the optimizer do not count.

    Args:
        config: Config of BuddyGPT or of a stock architecture with grouped-query or multi-head latent attention.
        length: Tokens in a row.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = config.num_hidden_layers * config.num_attention_heads * _attention_width(config)
    return 6 * (_matrix_parameters(model, config) + attention * length)


def _matrix_parameters(model: nn.Module, config: PreTrainedConfig) -> float:
    """Return the number of matrix elements that one token is multiplied with."""
    head = model.get_output_embeddings().weight
    lookups = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    total = 0
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter not in lookups:
            total += parameter.numel()

    # A token goes through some of the routed experts only.
    idle = 0.0
    for name, experts in model.named_modules():
        if not name.endswith(".experts"):
            continue
        idle_share = 1 - config.num_experts_per_tok / experts.num_experts
        for parameter in experts.parameters():
            if parameter.ndim > 1:
                idle += parameter.numel() * idle_share
    return total - idle


def _attention_width(config: PreTrainedConfig) -> int:
    """Return the elements of one head's query (a key has the same number) plus those of its value."""
    if getattr(config, "kv_lora_rank", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
