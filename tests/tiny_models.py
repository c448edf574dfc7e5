"""Tiny models of every kind, with random weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    eos_token_id=1,
    pad_token_id=0,
)
GQA = dict(num_key_value_heads=2)
MLA = dict(kv_lora_rank=12, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10)
MOE = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, first_k_dense_replace=1)
SIGMOID = dict(n_shared_experts=2, n_group=2, topk_group=1, routed_scaling_factor=1.5)  # GLM's and DeepSeek's
VARIANTS = {
    "gqa": GQA,
    "gqa-bias": GQA | dict(attention_bias=True),
    "gqa-norm": GQA | dict(use_qk_norm=True),
    "mla": MLA,
    "gqa-moe": GQA | MOE | dict(use_qk_norm=True),
    "mla-moe": MLA | MOE | SIGMOID | dict(scoring_func="sigmoid"),
    "soft-moe": GQA | dict(n_soft_experts=3, moe_intermediate_size=16),
}


def make_model(seed: int = 0, **fields) -> BuddyGPTForCausalLM:
    torch.manual_seed(seed)
    model = BuddyGPTForCausalLM(BuddyGPTConfig(**SIZES | {"initializer_range": 0.2} | fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a misplaced bias or norm
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias") and model.config.scoring_func == "sigmoid":
            torch.nn.init.normal_(buffer, std=0.3)
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def save_random_model(kind: str, workspace: Path) -> Path:
    """Save a `mixture` (MLA and experts) or a `qwen3` with the tokenizer of the workspace, and return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = SIZES | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(0)
    if kind == "mixture":
        mixture = MLA | MOE | SIGMOID | dict(scoring_func="sigmoid", aux_loss_alpha=0.01)
        model = BuddyGPTForCausalLM(BuddyGPTConfig(**sizes, **mixture))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=12))
    folder = workspace / kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_weights(first: Path, second: Path) -> bool:
    """Return True if the weights in two folders are bit-identical."""
    weights, expected = (load_file(folder / "model.safetensors") for folder in (first, second))
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
