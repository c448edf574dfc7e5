"""FLOPs per token against hand counts and PyTorch's counter, and peaks of devices."""

import pytest
import torch
from tiny_models import VARIANTS, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from buddygpt.model import BuddyGPTConfig
from buddygpt.model.presets import load_config
from buddygpt.training.flops import flops_per_token, peak_flops

DENSE = dict(vocab_size=100, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=4)  # fmt: skip


def test_dense_by_hand():
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 40  # q; k and v; o; gate, up and down
    attention = 2 * 4 * (4 + 4) * 32  # layers x heads x (query + value) x length
    expected = 6 * (2 * layer + 16 * 100 + attention)
    for tied in (True, False):
        assert flops_per_token(BuddyGPTConfig(**DENSE, tie_word_embeddings=tied), 32) == expected
        assert flops_per_token(Qwen3Config(**DENSE, tie_word_embeddings=tied), 32) == expected


def test_latent_attention_by_hand():
    latent = dict(q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    queries = 16 * 6 + 6 * 4 * (4 + 2)
    keys_and_values = 16 * (8 + 2) + 8 * 4 * (4 + 3)
    layer = queries + keys_and_values + 4 * 3 * 16 + 3 * 16 * 40
    attention = 2 * 4 * (6 + 3) * 32
    sizes = {key: value for key, value in DENSE.items() if key not in ("num_key_value_heads", "head_dim")}
    stock = DeepseekV3Config(**sizes, **latent, num_key_value_heads=4, first_k_dense_replace=2)
    for config in (BuddyGPTConfig(**sizes, **latent), stock):
        assert flops_per_token(config, 32) == 6 * (2 * layer + 16 * 100 + attention)


def test_mixture_by_hand():
    experts = dict(num_experts_per_tok=2, moe_intermediate_size=12)
    attention_matrices = 16 * 16 + 2 * 16 * 8 + 16 * 16
    routed = 16 * 8 + 2 * 3 * 16 * 12  # the router, and 2 of 8 experts
    attention = 2 * 4 * (4 + 4) * 32
    one_dense_layer = BuddyGPTConfig(
        **DENSE, **experts, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1
    )
    layers = 2 * attention_matrices + 3 * 16 * 40 + routed + 3 * 16 * 12  # and the shared expert
    assert flops_per_token(one_dense_layer, 32) == 6 * (layers + 16 * 100 + attention)
    stock = Qwen3MoeConfig(**DENSE, **experts, num_experts=8)
    assert flops_per_token(stock, 32) == 6 * (2 * (attention_matrices + routed) + 16 * 100 + attention)


@pytest.mark.parametrize(
    ("preset", "giga"),
    [
        ("buddygpt-0.1b", (1.03, 1.11, 1.26)),
        ("bitbrain-0.6b", (4.28, 4.99, 6.39)),  # Qwen3-0.6B's shape
        ("mini-qwen-1b", (6.60, 7.20, 8.41)),
        ("buddygpt-0.7b-mla-moe", (2.90, 3.35, 4.26)),
    ],
)
def test_presets_as_published(preset, giga):
    found = [flops_per_token(load_config(preset), length) / 1e9 for length in (1024, 2048, 4096)]
    assert found == pytest.approx(giga, abs=0.007)


@pytest.mark.parametrize("variant", ["gqa", "mla", "gqa-moe", "soft-moe"])
def test_pytorch_counts_the_same(variant):
    model = make_model(**VARIANTS[variant]).train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(0, model.config.vocab_size, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    found = flops_per_token(model.config, 16) * ids.numel()
    # The embedding's input needs no gradient, and a soft mixture also multiplies by its weights: small differences.
    assert counter.get_total_flops() == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize(
    ("device", "bfloat16", "float16"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 989),
        ("NVIDIA H100 PCIe", 756, 756),
        ("NVIDIA H200", 989, 989),
        ("NVIDIA A100-SXM4-80GB", 312, 312),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("NVIDIA GeForce RTX 4060 Ti", 44.1, 44.1),
        ("Tesla V100-SXM2-32GB", None, 125),
        ("Tesla V100-PCIE-16GB", None, 112),
        ("Tesla T4", None, 65),
        ("NVIDIA L40S", 362, 362),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 5090 D", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_of_devices(device, bfloat16, float16):
    found = [peak_flops(device, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == [bfloat16 and bfloat16 * 1e12, float16 and float16 * 1e12, None]
