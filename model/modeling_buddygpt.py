"""BuddyGPT: a pre-norm decoder with RMSNorm and RoPE, its attention and feed-forward layers chosen by the config.

Attention is grouped-query (GQA) or multi-head latent (MLA); the feed-forward layer is SwiGLU, a mixture of SwiGLU
experts (MoE), or a soft mixture. Each is one class, chosen in `BuddyGPTDecoderLayer.__init__`. With the same weights
the model equals a stock transformers architecture: Qwen2 (GQA, `attention_bias`), Qwen3 (GQA, `use_qk_norm`), Llama
(GQA), DeepSeek-V3 (MLA, with or without MoE), GLM-4-MoE (GQA, sigmoid MoE) or Qwen3-MoE (GQA, softmax MoE).

This file, `configuration_buddygpt.py` and `losses_buddygpt.py` are copied into every checkpoint, so they import torch
and transformers only.

Shapes: B batch, T new tokens, S tokens seen (cached + new), C hidden_size, H query heads, K key/value heads,
D head_dim, R kv_lora_rank, V vocab_size, N tokens of the batch (B x T), E experts, I width of an expert, k experts
per token.
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_buddygpt import BuddyGPTConfig
from .losses_buddygpt import ChunkedCrossEntropy, expert_scores, load_balancing_loss, rows_per_chunk


class BuddyGPTRMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467), computed in float32, over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)


class BuddyGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embedding (arXiv:2104.09864), with transformers' scaled types."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: BuddyGPTConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Return D/2 inverse frequencies and the factor on cos and sin. `PreTrainedModel` calls this by name."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) positions -> cos and sin of shape (B, T, D) in the dtype of `hidden_states`."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of `x` (B, heads, T, D) by the angles of `cos` and `sin` (B, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def rotate_both(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`rotate`] queries and keys."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of `x`, as DeepSeek does. The result has all first elements, then all second ones:
    the same order for queries and keys, so that their products stay."""
    return rotate(torch.cat((x[..., ::2], x[..., 1::2]), dim=-1), cos, sin)


def yarn_softmax_factor(rope_parameters: dict) -> float:
    """DeepSeek's factor on the attention scores of a model stretched by YaRN (`mscale_all_dim`); 1 for all others."""
    mscale, factor = rope_parameters.get("mscale_all_dim", 0), rope_parameters.get("factor", 1)
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2 if mscale and factor > 1 else 1.0


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
    """Attention written out, for `attn_implementation="eager"`: query (B, H, T, D), key and value (B, K, S, D) ->
    output (B, T, H, D) and weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BuddyGPTAttention(nn.Module):
    """Grouped-query attention: project, normalise if asked, rotate, cache, attend through transformers' interface."""

    rotate_both = staticmethod(rotate_both)  # a module may be given a fused kernel instead

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = BuddyGPTRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = BuddyGPTRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, C) -> (B, T, C), and the attention weights where the backend returns them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        query, key = self.rotate_both(query, key, *position_embeddings)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
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
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class BuddyGPTLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1, as in transformers' DeepSeek-V3).

    The cache holds, for each token, the latent (R) that all heads' keys and values are made of, and one rotated key
    (qk_rope_head_dim): R + qk_rope_head_dim numbers where grouped-query attention keeps 2 K D.
    """

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        self.is_causal = True
        self.query_dims = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.latent_dims = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.expanded_dims = [config.qk_nope_head_dim, config.v_head_dim]
        self.scaling = sum(self.query_dims) ** -0.5 * yarn_softmax_factor(config.rope_parameters)

        q_size, bias = self.num_heads * sum(self.query_dims), config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = BuddyGPTRMSNorm(config.q_lora_rank, eps=1e-6)  # DeepSeek's, whatever rms_norm_eps
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, sum(self.latent_dims), bias=bias)
        self.kv_a_layernorm = BuddyGPTRMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.num_heads * sum(self.expanded_dims), bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, C) -> (B, T, C), and the attention weights where the backend returns them."""
        batch, length = hidden_states.shape[:2]
        query = self.project_query(hidden_states).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q_nope, q_rot = query.split(self.query_dims, dim=-1)
        # One head for all: (B, 1, T, ...)
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split(self.latent_dims, dim=-1)
        latent = self.kv_a_layernorm(latent)
        q_rot, k_rot = (rotate_interleaved(x, *position_embeddings) for x in (q_rot, k_rot))
        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)

        attend = self.attend_in_latent_space if self.can_absorb(length, past_key_values) else self.attend
        output, weights = attend(q_nope, q_rot, latent, k_rot, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, H x query head width), through the queries' latent where there is one."""
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def can_absorb(self, length: int, past_key_values: Cache | None) -> bool:
        """Whether this is a decoding step of one token that may read `kv_b_proj`'s weight itself: not where an adapter
        or a quantised layer stands in its place, nor where the backend wants values as wide as keys."""
        plain = type(self.kv_b_proj) is nn.Linear and "flash" not in self.config._attn_implementation
        return length == 1 and past_key_values is not None and plain

    def attend(self, q_nope, q_rot, latent, k_rot, attention_mask, **kwargs):
        """Expand the latents (B, 1, S, R) into each head's keys and values -> (B, T, H, v_head_dim) and weights."""
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split(self.expanded_dims, dim=-1)
        key = torch.cat((k_nope, k_rot.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return self.call_backend(torch.cat((q_nope, q_rot), dim=-1), key, value, attention_mask, **kwargs)

    def attend_in_latent_space(self, q_nope, q_rot, latent, k_rot, attention_mask, **kwargs):
        """The same without expanding S tokens: `kv_b_proj` is absorbed into the query and the output instead."""
        k_up, v_up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(self.expanded_dims, dim=1)
        query = torch.cat((q_nope @ k_up, q_rot), dim=-1)
        key = torch.cat((latent, k_rot), dim=-1).expand(-1, self.num_heads, -1, -1)
        value = latent.expand(-1, self.num_heads, -1, -1)
        output, weights = self.call_backend(query, key, value, attention_mask, **kwargs)
        return (output.transpose(1, 2) @ v_up.mT).transpose(1, 2), weights

    def call_backend(self, query, key, value, attention_mask, **kwargs):
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

    `e_score_correction_bias` takes part in the choice, not in the weights, and has no gradient: a callback moves it
    towards balance.
    """

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, C) -> logits (N, E), weights (N, k) and indices (N, k) of the chosen experts."""
        config = self.config
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        scores = expert_scores(logits, config.scoring_func)
        choice = (scores + self.e_score_correction_bias).unflatten(-1, (config.n_group, -1))
        group_scores = choice.topk(2, dim=-1).values.sum(-1)
        best_groups = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best_groups, True)
        choice = choice.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        indices = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * config.routed_scaling_factor, indices


@use_experts_implementation
class BuddyGPTExperts(nn.Module):
    """The weights of E SwiGLU experts in two tensors. `experts_implementation` of the model chooses how they run:
    "grouped_mm" (default) and "batched_mm" without leaving the device, "eager" as written here."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """Tokens (N, C), indices (N, k) and weights (N, k) of their experts -> weighted sum (N, C)."""
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, place = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], gate_up).chunk(2, dim=-1)
            expert_output = nn.functional.linear(self.act_fn(gate) * up, down) * top_k_weights[token, place, None]
            output = output.index_add(0, token, expert_output.to(output.dtype))
        return output


class BuddyGPTMoE(nn.Module):
    """Mixture of routed experts: (B, T, C) -> (B, T, C). No token is dropped."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.gate = BuddyGPTTopkRouter(config)
        self.experts = BuddyGPTExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)
        _, weights, indices = self.gate(tokens)
        return self.run_experts(tokens, indices, weights).view_as(hidden_states)

    def run_experts(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Call the experts; under autocast in its dtype, which grouped products do not take on by themselves
        (pytorch#174763): float32 weights would be multiplied in float32."""
        device = tokens.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.experts(tokens, indices, weights)
        dtype = torch.get_autocast_dtype(device)
        parameters = {name: parameter.to(dtype) for name, parameter in self.experts.named_parameters()}
        return functional_call(self.experts, parameters, (tokens.to(dtype), indices, weights))


class BuddyGPTSharedMoE(BuddyGPTMoE):
    """The same beside shared experts, which every token goes through (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__(config)
        self.shared_experts = BuddyGPTMLP(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.shared_experts(hidden_states)


class BuddyGPTSoftMoE(nn.Module):
    """Every expert for every token, weighted by a softmax over the experts: (B, T, C) -> (B, T, C).

    The intent of Steel-LLM's feed-forward layer (arXiv:2502.06635 section 2.2) in causal form. As published, a softmax
    over the *sequence* mixes tokens before the experts (Soft MoE, arXiv:2308.00951), so each token reads later ones;
    here a token is weighted and transformed alone. The expert is Steel-LLM's: two SwiGLU steps, four matrices.
    """

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        experts, width, hidden = config.n_soft_experts, config.moe_intermediate_size, config.hidden_size
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.gate_down_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)
        weights = self.gate(tokens).softmax(-1, dtype=torch.float32).to(tokens.dtype)
        gate, up = (tokens @ self.gate_up_proj.mT).chunk(2, dim=-1)  # (E, N, I) each
        gate, down = ((self.act_fn(gate) * up) @ self.gate_down_proj.mT).chunk(2, dim=-1)  # (E, N, C) each
        return torch.einsum("ne,enc->nc", weights, self.act_fn(gate) * down).view_as(hidden_states)


def feed_forward(config: BuddyGPTConfig, layer_idx: int) -> nn.Module:
    """The feed-forward layer that `config` gives layer `layer_idx` (from 0)."""
    if config.n_soft_experts is not None:
        return BuddyGPTSoftMoE(config)
    if config.n_routed_experts is None or layer_idx < config.first_k_dense_replace:
        return BuddyGPTMLP(config, config.intermediate_size)
    return BuddyGPTSharedMoE(config) if config.n_shared_experts else BuddyGPTMoE(config)


class BuddyGPTDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm layer. Its constructor is where the kind of attention and of feed-forward layer is chosen."""

    def __init__(self, config: BuddyGPTConfig, layer_idx: int):
        super().__init__()
        attention = BuddyGPTAttention if config.kv_lora_rank is None else BuddyGPTLatentAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = feed_forward(config, layer_idx)
        self.input_layernorm = BuddyGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BuddyGPTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BuddyGPTPreTrainedModel(PreTrainedModel):
    """What the base class needs to know; it loads, saves and initialises (see `initializer_range`)."""

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
    _can_record_outputs = {
        "hidden_states": BuddyGPTDecoderLayer,
        "attentions": [BuddyGPTAttention, BuddyGPTLatentAttention],
        "router_logits": OutputRecorder(BuddyGPTTopkRouter, index=0),
        "router_indices": OutputRecorder(BuddyGPTTopkRouter, index=2),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
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
        # No padding_idx: where a tokenizer pads with the document separator (Qwen), that token would never learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BuddyGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
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
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, C) in their place, not both.
            attention_mask: (B, S), 0 on padding; None where there is none.
            position_ids: (B, T). Where they restart at 0 inside a row, the row holds several packed documents, and
                none sees another, provided that neither `attention_mask` nor a cache is given (`use_cache=False`).
            past_key_values: Cache of the tokens seen before. None with `use_cache`: a new `DynamicCache`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, and arguments of the attention
                backend.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

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
    """The decoder with its output head: token ids (B, T) -> logits (B, T, V), and the loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    cross_entropy = ChunkedCrossEntropy.apply  # a model may be given a fused kernel instead

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
        """See [`BuddyGPTModel.forward`], and:

        Args:
            labels: (B, T), the input ids with -100 where no loss is wanted; shifted inside.
            logits_to_keep: Compute the logits of the last N positions only (0: all), or of these positions.
            skip_logits: Return the loss without logits, a few of which exist at a time: what is needed of memory does
                not grow with B x T x V. None: in training where labels are given (as with Liger's kernels).
            kwargs: `num_items_in_batch` (the loss is a sum divided by it, so that accumulated steps weigh every token
                alike), `shift_labels`, and see [`BuddyGPTModel.forward`].
        """
        balance = labels is not None and self.config.aux_loss_alpha > 0
        if balance:
            kwargs |= {"output_router_logits": True, "output_router_indices": True}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = logits = None
        if labels is not None and (self.training if skip_logits is None else skip_logits):
            loss = self.loss_without_logits(outputs.last_hidden_state, labels, **kwargs)
        else:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if balance:
            aux_loss = load_balancing_loss(
                outputs.router_logits, outputs.router_indices, labels, attention_mask, self.config, **kwargs
            )
            # A gradient without a value: the loss that is shown stays the language model's own.
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
        """The loss of `self.loss_function` for hidden states (B, T, C), its arguments the same; and its gradient with
        that of the z-loss (`z_loss_coef`)."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        hidden_states = hidden_states.flatten(0, -2)
        targets = shift_labels.flatten().to(hidden_states.device)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(hidden_states.device)
        # An adapter, a quantised or an offloaded head, or one sharded by ZeRO-3 or FSDP, has to be called.
        weight = self.lm_head.weight
        readable = type(self.lm_head) is nn.Linear and weight.device == hidden_states.device
        if readable and not hasattr(weight, "ds_id"):
            coef, with_gradient = self.config.z_loss_coef, torch.is_grad_enabled()
            total = self.cross_entropy(hidden_states, weight, targets, coef, with_gradient)
        else:
            rows = rows_per_chunk(hidden_states.device, self.config.vocab_size)
            total = sum(
                checkpoint(self.cross_entropy_of_rows, *chunk, use_reentrant=False)
                for chunk in zip(hidden_states.split(rows), targets.split(rows), strict=True)
            )
        return total / num_items_in_batch

    def cross_entropy_of_rows(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The same as [`ChunkedCrossEntropy`] through a call of the head, in one piece."""
        logits = self.lm_head(hidden_states).float()
        total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        if self.config.z_loss_coef:
            z_loss = self.config.z_loss_coef * (logits.logsumexp(-1).square() * (targets != -100)).sum()
            total = total + (z_loss - z_loss.detach())
        return total
