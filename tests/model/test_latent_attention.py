"""The cache of multi-head latent attention holds the latent, and decoding in latent space changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MLA, SIZES, make_model, random_ids

from buddygpt.model.modeling_buddygpt import BuddyGPTLatentAttention


def cached_numbers(model, length: int) -> int:
    """Return how many numbers the cache holds per token, over all layers."""
    cache = model(random_ids(1, length), use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) // length


def test_the_cache_holds_the_latent_and_one_rotated_key():
    layers = SIZES["num_hidden_layers"]
    assert cached_numbers(make_model(**MLA), 10) == layers * (MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"])
    assert cached_numbers(make_model(num_key_value_heads=2), 10) == layers * 2 * 2 * 12


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The attention methods that were called, in order."""
    calls = []

    def spy_on(name: str) -> None:
        original = getattr(BuddyGPTLatentAttention, name)

        def spy(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(BuddyGPTLatentAttention, name, spy)

    spy_on("attend")
    spy_on("attend_in_latent_space")
    return calls


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("q_lora_rank", "backend"),
    [(None, "eager"), (None, "sdpa"), (20, "eager"), (20, "sdpa")]
    + [pytest.param(20, "flex_attention", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_a_step_in_latent_space_equals_the_expanded_one(calls, monkeypatch, q_lora_rank, backend):
    model, ids = make_model(**MLA | dict(q_lora_rank=q_lora_rank), attn_implementation=backend), random_ids(2, 12)
    mask = torch.ones_like(ids)
    if backend != "flex_attention":  # torch 2.13 cannot compile one token with a padding mask for the CPU
        mask[0, :4] = 0  # left padding is seen in latent space too
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = dict(attention_mask=mask[:, :11], position_ids=positions[:, :11])
    step = dict(attention_mask=mask, position_ids=positions[:, 11:])
    cache = model(ids[:, :11], use_cache=True, **start).past_key_values
    absorbed = model(ids[:, 11:], past_key_values=cache, **step).logits
    assert calls == ["attend"] * 3 + ["attend_in_latent_space"] * 3
    monkeypatch.setattr(BuddyGPTLatentAttention, "can_absorb", lambda self, *args: False)
    cache = model(ids[:, :11], use_cache=True, **start).past_key_values
    expanded = model(ids[:, 11:], past_key_values=cache, **step).logits
    assert calls[6:] == ["attend"] * 6
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-5)


def test_an_adapter_on_the_expanding_matrix_counts_in_decoding(calls):
    """Decoding in latent space reads only `kv_b_proj.weight`, so it would silently ignore an adapter on it."""
    model = get_peft_model(make_model(**MLA), LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False))
    ids = random_ids(1, 9)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    step = model(ids[:, 8:], past_key_values=cache).logits
    assert "attend_in_latent_space" not in calls
    torch.testing.assert_close(step, model(ids).logits[:, 8:], rtol=0, atol=1e-5)
