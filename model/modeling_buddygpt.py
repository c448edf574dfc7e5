"""The BuddyGPT model: a decoder-only transformer with RMSNorm before each sublayer and rotary positions (RoPE).

The config chooses the sublayers of each decoder layer; `BuddyGPTDecoderLayer.__init__` builds them:

- attention: grouped-query (GQA) or multi-head latent (MLA)
- feed-forward: SwiGLU, a mixture of SwiGLU experts (MoE), or a soft mixture

With the same weights, most configs give the same logits as a stock transformers architecture: Qwen2 (GQA with
`attention_bias`), Qwen3 (GQA with `use_qk_norm`), Llama (GQA), DeepSeek-V3 (MLA, dense or MoE), GLM-4-MoE (GQA with
sigmoid MoE) or Qwen3-MoE (GQA with softmax MoE).

This file is copied into every checkpoint together with `configuration_buddygpt.py` and `losses_buddygpt.py`, so it may
import only torch, transformers and those two files.

Shapes in the comments:
    B  batch size                      H  query heads
    T  new tokens                      K  key/value heads
    S  tokens seen (cached + new)      D  head_dim
    C  hidden_size                     R  kv_lora_rank
    V  vocab_size                      E  experts
    N  tokens of the batch (B x T)     I  width of one expert
                                       k  experts per token
"""

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_buddygpt import BuddyGPTConfig
from .losses_buddygpt import ChunkedCrossEntropy, expert_scores, load_balancing_loss, rows_per_chunk


class BuddyGPTRMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) of the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(mean_square + self.eps)
        return self.weight * hidden_states.to(input_dtype)


class BuddyGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embedding (arXiv:2104.09864), including transformers' scaled types."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        # `dynamic_rope_update` reads these two lengths and `original_inv_freq`.
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings

        if self.rope_type in ROPE_INIT_FUNCTIONS:
            init_function = ROPE_INIT_FUNCTIONS[self.rope_type]
        else:
            init_function = self.compute_default_rope_parameters
        inv_freq, self.attention_scaling = init_function(config)
        # Not saved: they follow from the config.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: BuddyGPTConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Return the D/2 inverse frequencies and the factor on cos and sin. `PreTrainedModel` calls this by name."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of shape (B, T, D) for positions (B, T), in the dtype of `hidden_states`."""
        inv_freq = self.inv_freq.to(hidden_states.device, torch.float)
        # The angles stay in float32: bfloat16 cannot tell position 4095 from 4080.
        angles = position_ids[..., None].float() * inv_freq  # (B, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of `x` (B, heads, T, D) by the angles of `cos` and `sin` (B, T, D)."""
    first_half, second_half = x.chunk(2, dim=-1)
    rotated = torch.cat((-second_half, first_half), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def apply_rotary_to_both(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call [`apply_rotary`] on queries and keys. A fused kernel with this signature can replace it."""
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)


def apply_rotary_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of `x` (B, heads, T, D), as DeepSeek does.

    The result holds the first elements of all pairs, then the second ones. Queries and keys get the same order, so
    their dot products do not change.
    """
    first_elements, second_elements = x[..., ::2], x[..., 1::2]
    return apply_rotary(torch.cat((first_elements, second_elements), dim=-1), cos, sin)


def yarn_softmax_factor(rope_parameters: dict) -> float:
    """Return DeepSeek's factor on the attention scores of a model extended by YaRN (`mscale_all_dim`), else 1."""
    mscale = rope_parameters.get("mscale_all_dim", 0)
    factor = rope_parameters.get("factor", 1)
    if not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch, used with `attn_implementation="eager"`.

    Args:
        query: (B, H, T, D).
        key, value: (B, K, S, D).
        attention_mask: (B, 1, T, S), added to the scores: 0 for visible tokens, a large negative number for others.

    Returns:
        The output (B, T, H, D) and the attention weights (B, H, T, S).
    """
    # Each key/value head serves a group of query heads: (B, K, S, D) -> (B, H, S, D)
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights @ value  # (B, H, T, D)
    return output.transpose(1, 2).contiguous(), weights


class BuddyGPTAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245), with an optional RMSNorm of queries and keys as in Qwen3."""

    # An attribute, so that one model can use a fused kernel instead (see liger_kernels.py in the repository).
    apply_rotary_to_both = staticmethod(apply_rotary_to_both)

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm = BuddyGPTRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = BuddyGPTRMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, T, C) for `hidden_states` (B, T, C), and the attention weights (None for a backend
        that does not return them)."""
        batch_size, length, _ = hidden_states.shape

        # Project and split into heads: (B, T, C) -> (B, T, H or K, D). The norms see one head at a time.
        query = self.q_norm(self.q_proj(hidden_states).view(batch_size, length, -1, self.head_dim))
        key = self.k_norm(self.k_proj(hidden_states).view(batch_size, length, -1, self.head_dim))
        value = self.v_proj(hidden_states).view(batch_size, length, -1, self.head_dim)

        # Heads before tokens, as the attention backends expect: (B, H or K, T, D)
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)

        cos, sin = position_embeddings
        query, key = self.apply_rotary_to_both(query, key, cos, sin)
        if past_key_values is not None:
            # The cache appends the new tokens and returns all of them: (B, K, S, D)
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # Join the heads: (B, T, H, D) -> (B, T, H x D) -> (B, T, C)
        return self.o_proj(output.reshape(batch_size, length, -1)), weights


class BuddyGPTLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1, as in transformers' DeepSeek-V3).

    Each query and key head has a part without position (`nope`) and a rotated part (`rope`). All heads share the
    rotated part of the key; the rest of the keys, and the values, are computed from one latent vector per token. The
    cache holds only that latent and the rotated key: R + qk_rope_head_dim numbers per token, where grouped-query
    attention holds 2 x K x D.
    """

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # after expansion every head has its own keys and values
        self.is_causal = True
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling = qk_head_dim**-0.5 * yarn_softmax_factor(config.rope_parameters)

        # Queries: straight from the hidden states, or through their own latent.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, self.num_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            # DeepSeek-V3 fixes the epsilon of the latents' norms; it does not follow `rms_norm_eps`.
            self.q_a_layernorm = BuddyGPTRMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * qk_head_dim, bias=False)

        # Keys and values: down to the latent and the shared rotated key, then up to every head's key and value.
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = BuddyGPTRMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, self.num_heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, T, C) for `hidden_states` (B, T, C), and the attention weights (None for a backend
        that does not return them)."""
        batch_size, length, _ = hidden_states.shape

        # (B, T, C) -> (B, H, T, qk_nope_head_dim + qk_rope_head_dim), split into the two parts
        query = self.project_query(hidden_states).view(batch_size, length, self.num_heads, -1).transpose(1, 2)
        query_nope, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        # (B, T, C) -> (B, 1, T, R + qk_rope_head_dim): one "head" that all query heads share
        compressed = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, key_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)

        cos, sin = position_embeddings
        query_rope = apply_rotary_interleaved(query_rope, cos, sin)
        key_rope = apply_rotary_interleaved(key_rope, cos, sin)
        if past_key_values is not None:
            # The cache keeps latents and rotated keys: (B, 1, S, R) and (B, 1, S, qk_rope_head_dim)
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)

        inputs = (query_nope, query_rope, latent, key_rope, attention_mask)
        if self.can_absorb(length, past_key_values):
            output, weights = self.attend_in_latent_space(*inputs, **kwargs)
        else:
            output, weights = self.attend(*inputs, **kwargs)
        # Join the heads: (B, T, H, v_head_dim) -> (B, T, C)
        return self.o_proj(output.reshape(batch_size, length, -1)), weights

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, H x (qk_nope_head_dim + qk_rope_head_dim))."""
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def can_absorb(self, length: int, past_key_values: Cache | None) -> bool:
        """Return True for a decoding step that can use [`attend_in_latent_space`]."""
        is_decoding_step = length == 1 and past_key_values is not None
        # An adapter or a quantized layer must be called; its weight alone is not the whole projection.
        has_plain_weight = type(self.kv_b_proj) is nn.Linear
        # Flash attention requires values as wide as keys.
        takes_narrow_values = "flash" not in self.config._attn_implementation
        return is_decoding_step and has_plain_weight and takes_narrow_values

    def attend(self, query_nope, query_rope, latent, key_rope, attention_mask, **kwargs):
        """Expand the latents (B, 1, S, R) into every head's keys and values, then attend as usual.

        Returns:
            The output (B, T, H, v_head_dim) and the attention weights.
        """
        # (B, S, R) -> (B, H, S, qk_nope_head_dim + v_head_dim)
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        return self.call_backend(query, key, value, attention_mask, **kwargs)

    def attend_in_latent_space(self, query_nope, query_rope, latent, key_rope, attention_mask, **kwargs):
        """Return what [`attend`] returns without expanding the S cached latents ("weight absorption").

        With `kv_b_proj` = (W_key, W_value) of one head: query @ (W_key @ latent) = (query @ W_key) @ latent, and the
        weighted sum of W_value @ latent is W_value @ (weighted sum of latents). So queries move into the latent space,
        latents serve as keys and values, and only the result moves back.
        """
        weight_by_head = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # (H, nope + v_head_dim, R)
        key_weight, value_weight = weight_by_head.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        query = torch.cat((query_nope @ key_weight, query_rope), dim=-1)  # (B, H, 1, R + qk_rope_head_dim)
        key = torch.cat((latent, key_rope), dim=-1).expand(-1, self.num_heads, -1, -1)
        value = latent.expand(-1, self.num_heads, -1, -1)  # (B, H, S, R)
        output, weights = self.call_backend(query, key, value, attention_mask, **kwargs)  # (B, 1, H, R)
        output = output.transpose(1, 2) @ value_weight.mT  # (B, H, 1, v_head_dim)
        return output.transpose(1, 2), weights

    def call_backend(self, query, key, value, attention_mask, **kwargs):
        """Run the chosen attention implementation on tensors (B, H, T or S, width).

        Returns:
            The output (B, T, H, width of a value) and the attention weights.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        return attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)


class BuddyGPTMLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv:2002.05202): (B, T, C) -> (B, T, C)."""

    def __init__(self, config: BuddyGPTConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class BuddyGPTTopkRouter(nn.Module):
    """Choose k of E experts for each token, in float32 (DeepSeek-V3, arXiv:2412.19437 section 2.1.2).

    `e_score_correction_bias` affects which experts are chosen, not their weights. It has no gradient; during
    pretraining a callback moves it to balance the load.
    """

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (N, E), and the weights (N, k) and indices (N, k) of the chosen experts, for (N, C)."""
        config = self.config
        # Close scores would be rounded to ties in bfloat16, so autocast is off here.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        scores = expert_scores(logits, config.scoring_func)  # (N, E)

        # Choose topk_group of n_group groups; a group's score is the sum of its two best experts' scores.
        biased = scores + self.e_score_correction_bias
        biased = biased.unflatten(-1, (config.n_group, -1))  # (N, groups, E / groups)
        group_scores = biased.topk(2, dim=-1).values.sum(-1)  # (N, groups)
        best_groups = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        is_allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best_groups, True)

        # Choose k experts of these groups.
        biased = biased.masked_fill(~is_allowed.unsqueeze(-1), float("-inf")).flatten(1)  # (N, E)
        indices = biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices  # (N, k)

        # The weights are the scores without the bias.
        weights = scores.gather(1, indices)  # (N, k)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * config.routed_scaling_factor, indices


@use_experts_implementation
class BuddyGPTExperts(nn.Module):
    """E SwiGLU experts, their weights stacked in two tensors.

    The decorator runs them as `experts_implementation` says: "grouped_mm" (default) and "batched_mm" run all experts
    on the device without waiting for the host; "eager" is the loop in `forward`.
    """

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))  # (E, 2I, C)
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))  # (E, C, I)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """Return the weighted sum (N, C) of the experts' outputs.

        Args:
            hidden_states: (N, C).
            top_k_index, top_k_weights: Chosen experts of each token and their weights, (N, k) each.
        """
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up_weight, down_weight) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            # The tokens that chose this expert, and in which of their k slots.
            token, slot = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], gate_up_weight).chunk(2, dim=-1)
            expert_output = nn.functional.linear(self.act_fn(gate) * up, down_weight)
            expert_output = expert_output * top_k_weights[token, slot, None]
            output = output.index_add(0, token, expert_output.to(output.dtype))
        return output


class BuddyGPTMoE(nn.Module):
    """Mixture of routed experts: (B, T, C) -> (B, T, C). No token is dropped."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.gate = BuddyGPTTopkRouter(config)
        self.experts = BuddyGPTExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)  # (N, C)
        _, weights, indices = self.gate(tokens)
        return self.run_experts(tokens, indices, weights).view_as(hidden_states)

    def run_experts(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Call the experts on tokens (N, C), under autocast in autocast's dtype."""
        device = tokens.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.experts(tokens, indices, weights)
        # Autocast does not cover grouped products (pytorch#174763): without these casts the float32 weights would be
        # multiplied in float32.
        dtype = torch.get_autocast_dtype(device)
        parameters = {name: parameter.to(dtype) for name, parameter in self.experts.named_parameters()}
        return functional_call(self.experts, parameters, (tokens.to(dtype), indices, weights))


class BuddyGPTSharedMoE(BuddyGPTMoE):
    """Routed experts plus shared experts that process every token (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__(config)
        self.shared_experts = BuddyGPTMLP(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.shared_experts(hidden_states)


class BuddyGPTSoftMoE(nn.Module):
    """Soft mixture: every expert processes every token, weighted by a softmax over the experts.

    A causal form of Steel-LLM's feed-forward layer (arXiv:2502.06635 section 2.2). The published layer mixes tokens by
    a softmax over the *sequence* before the experts (Soft MoE, arXiv:2308.00951), so each token reads later ones; here
    each token is weighted and transformed alone. The expert is Steel-LLM's: two SwiGLU steps, four matrices.
    """

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        experts, width, hidden_size = config.n_soft_experts, config.moe_intermediate_size, config.hidden_size
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))  # (E, 2I, C)
        self.gate_down_proj = nn.Parameter(torch.empty(experts, 2 * hidden_size, width))  # (E, 2C, I)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        tokens = hidden_states.flatten(0, 1)  # (N, C)
        weights = self.gate(tokens).softmax(-1, dtype=torch.float32).to(tokens.dtype)  # (N, E)
        # First SwiGLU step: (N, C) -> (E, N, I)
        gate, up = (tokens @ self.gate_up_proj.mT).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        # Second SwiGLU step: (E, N, I) -> (E, N, C)
        gate, down = (inner @ self.gate_down_proj.mT).chunk(2, dim=-1)
        expert_outputs = self.act_fn(gate) * down
        return torch.einsum("ne,enc->nc", weights, expert_outputs).view_as(hidden_states)


def build_feed_forward(config: BuddyGPTConfig, layer_idx: int) -> nn.Module:
    """Return the feed-forward layer that `config` asks for in layer `layer_idx` (counted from 0)."""
    if config.n_soft_experts is not None:
        return BuddyGPTSoftMoE(config)
    if config.n_routed_experts is None or layer_idx < config.first_k_dense_replace:
        return BuddyGPTMLP(config, config.intermediate_size)
    if config.n_shared_experts > 0:
        return BuddyGPTSharedMoE(config)
    return BuddyGPTMoE(config)


class BuddyGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each with an RMSNorm before it and a residual connection around it."""

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        if config.kv_lora_rank is None:
            self.self_attn = BuddyGPTAttention(config, layer_idx)
        else:
            self.self_attn = BuddyGPTLatentAttention(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        self.input_layernorm = BuddyGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BuddyGPTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). `kwargs` go to the attention."""
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BuddyGPTPreTrainedModel(PreTrainedModel):
    """Settings that `PreTrainedModel` reads for loading, saving and running the model, and its initialization."""

    config: BuddyGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BuddyGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Which module's outputs `output_hidden_states=True` and the like collect; `index` picks one of several.
    _can_record_outputs = {
        "hidden_states": BuddyGPTDecoderLayer,
        "attentions": [BuddyGPTAttention, BuddyGPTLatentAttention],
        "router_logits": OutputRecorder(BuddyGPTTopkRouter, index=0),
        "router_indices": OutputRecorder(BuddyGPTTopkRouter, index=2),
    }
    # bfloat16 would round away the small steps by which pretraining moves the bias.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what `PreTrainedModel` does not know: routers and experts, whose weights are bare parameters."""
        super()._init_weights(module)
        if isinstance(module, BuddyGPTTopkRouter):
            init.zeros_(module.e_score_correction_bias)
        if isinstance(module, BuddyGPTTopkRouter | BuddyGPTExperts | BuddyGPTSoftMoE):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class BuddyGPTModel(BuddyGPTPreTrainedModel):
    """Embedding, decoder layers and the final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__(config)
        # No padding_idx: some tokenizers (Qwen) pad with the document separator, which then would get no gradient.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BuddyGPTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = BuddyGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = BuddyGPTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: Token ids (B, T).
            attention_mask: (B, S), 0 on padding; None if there is no padding.
            position_ids: (B, T). If they restart at 0 within a row, the row holds several packed documents, and tokens
                see their own document only. This requires `attention_mask=None` and `use_cache=False`.
            past_key_values: Cache of the tokens seen before. None with `use_cache`: start a new `DynamicCache`.
            inputs_embeds: Embeddings (B, T, C) instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, and arguments of the attention
                backend.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, C)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            # Continue to count after the cached tokens.
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = positions.unsqueeze(0)  # (1, T)

        # All layers share the mask and the rotary angles. The mask function finds packed documents by `position_ids`.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class BuddyGPTForCausalLM(BuddyGPTPreTrainedModel, GenerationMixin):
    """The decoder with its output head: token ids (B, T) -> logits (B, T, V), and the loss if labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # An attribute, so that one model can use a fused kernel instead (see liger_kernels.py in the repository).
    cross_entropy = ChunkedCrossEntropy.apply

    def __init__(self, config: BuddyGPTConfig):
        super().__init__(config)
        self.model = BuddyGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Run the model. The other arguments are those of [`BuddyGPTModel.forward`].

        Args:
            labels: (B, T), the input ids with -100 at tokens that do not count; shifted here.
            logits_to_keep: Compute the logits of only the last N positions (0: all), or of these positions.
            skip_logits: Compute the loss without returning logits, a chunk of them at a time, so that memory does not
                grow with B x T x V. None: in training, if labels are given (the name is that of Liger's models).
            kwargs: `num_items_in_batch` (divide the summed loss by it, so that every token weighs the same over
                accumulated batches), `shift_labels` (labels that are already shifted), and those of
                [`BuddyGPTModel.forward`].
        """
        use_balance_loss = labels is not None and self.config.aux_loss_alpha > 0
        if use_balance_loss:
            kwargs["output_router_logits"] = True
            kwargs["output_router_indices"] = True

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, C)

        # Cross entropy of the next token.
        if skip_logits is None:
            skip_logits = self.training
        loss = None
        logits = None
        if labels is not None and skip_logits:
            loss = self.loss_without_logits(hidden_states, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])  # (B, T, V)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        # Balance of the experts.
        aux_loss = None
        if use_balance_loss:
            aux_loss = load_balancing_loss(
                outputs.router_logits, outputs.router_indices, labels, attention_mask, self.config, **kwargs
            )
            # This adds a gradient and the value 0, so that the reported loss is the language model's alone.
            loss = loss + self.config.aux_loss_alpha * (aux_loss - aux_loss.detach())

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return the loss of `self.loss_function` for hidden states (B, T, C), without holding all logits.

        The gradient includes that of the z-loss (`z_loss_coef`). The arguments are those of `self.loss_function`.
        """
        # Position t predicts token t + 1; the last position has no target.
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        hidden_states = hidden_states.flatten(0, -2)  # (N, C)
        targets = shift_labels.flatten().to(hidden_states.device)  # (N,)

        # Divide by the tokens that count: of this batch, or of all accumulated batches.
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(hidden_states.device)

        weight = self.lm_head.weight
        if self.can_read_head_weight(hidden_states.device):
            total = self.cross_entropy(
                hidden_states, weight, targets, self.config.z_loss_coef, torch.is_grad_enabled()
            )
        else:
            # Call the head chunk by chunk; checkpointing computes a chunk's logits again in the backward pass.
            rows = rows_per_chunk(hidden_states.device, self.config.vocab_size)
            total = 0
            for chunk, chunk_targets in zip(hidden_states.split(rows), targets.split(rows), strict=True):
                total = total + checkpoint(self.cross_entropy_of_rows, chunk, chunk_targets, use_reentrant=False)
        return total / num_items_in_batch

    def can_read_head_weight(self, device: torch.device) -> bool:
        """Return False if the head must be called as a module: an adapter, a quantized or offloaded head, or a weight
        that ZeRO-3 (`ds_id`) or FSDP shards."""
        weight = self.lm_head.weight
        return type(self.lm_head) is nn.Linear and weight.device == device and not hasattr(weight, "ds_id")

    def cross_entropy_of_rows(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return what [`ChunkedCrossEntropy`] returns, by calling the head once: (N, C) and (N,) -> scalar."""
        logits = self.lm_head(hidden_states).float()
        total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        if self.config.z_loss_coef:
            is_counted = targets != -100
            z_loss = self.config.z_loss_coef * (logits.logsumexp(-1).square() * is_counted).sum()
            total = total + (z_loss - z_loss.detach())  # a gradient, but no value
        return total


class BuddyGPTForSequenceClassification(GenericForSequenceClassification, BuddyGPTPreTrainedModel):
    """The decoder with a score of the last token that is no padding: token ids (B, T) -> (B, `num_labels`).

    With `num_labels` 1, it is a reward model.
    """
