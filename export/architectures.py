"""Translate configs and weights between BuddyGPT and the stock architectures of transformers that equal it.

`native_configs` and `buddygpt_config` translate configs, `to_native` and `from_native` models. A field that both sides
have means the same on both; this file contains everything else that differs.
"""

import re
from collections.abc import Iterator

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

# (attention_bias, use_qk_norm) -> equivalent dense architectures, the usual one first. Llama can replace Qwen2:
# transformers reads every tokenizer next to a Qwen2 model with Qwen's own normalizer and pre-tokenizer, even if
# tokenizer.json has others.
DENSE: dict[tuple[bool, bool], tuple[type[PreTrainedConfig], ...]] = {
    (True, False): (Qwen2Config, LlamaConfig),
    (False, True): (Qwen3Config,),
    (True, True): (Qwen3Config,),
    (False, False): (LlamaConfig,),
}
# Architectures that can be imported, with the BuddyGPT fields that their own configs do not have.
IMPORTABLE: dict[type[PreTrainedConfig], dict[str, bool | str]] = {
    Qwen2Config: {"attention_bias": True},
    Qwen3Config: {"use_qk_norm": True},
    LlamaConfig: {},
    DeepseekV3Config: {"scoring_func": "sigmoid"},
    Glm4MoeConfig: {"scoring_func": "sigmoid"},
    Qwen3MoeConfig: {"use_qk_norm": True, "scoring_func": "softmax"},
}
EXPERT_FIELDS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "first_k_dense_replace",
    "scoring_func",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
# Weights that only one side has and that change nothing if they are zeros: Qwen3, Llama, DeepSeek-V3 and Qwen3-MoE add
# a bias to o_proj together with the others, DeepSeek-V3 and GLM-4-MoE always have a shared expert, and Qwen3-MoE never
# has a selection bias.
ZERO_IF_ABSENT = re.compile(r"\.o_proj\.bias$|\.e_score_correction_bias$|\.shared_experts\.")


def native_configs(config: BuddyGPTConfig) -> Iterator[PreTrainedConfig]:
    """Yield the config of every stock architecture that equals a BuddyGPT model, the usual one first.

    Raises:
        ValueError: No architecture equals it; the message says why.
        StrictDataclassError: The stock config refuses the sizes.
    """
    for architecture in _equivalent_architectures(config):
        fields = {name: getattr(config, name) for name in _shared_fields(architecture)}
        if config.n_routed_experts is None:
            fields = _without_expert_fields(fields)

        if architecture in (DeepseekV3Config, Glm4MoeConfig):
            # A dense model is one whose layers are all dense. There is always a shared expert.
            fields["n_shared_experts"] = max(1, config.n_shared_experts)
            if config.n_routed_experts is None:
                fields["first_k_dense_replace"] = config.num_hidden_layers
            else:
                fields["first_k_dense_replace"] = config.first_k_dense_replace
            # vLLM and SGLang read the output head of these two from the checkpoint, even if it is tied.
            fields["tie_word_embeddings"] = False
            fields["num_mtp_layers"] = 0
        if architecture is Glm4MoeConfig:
            fields["rope_parameters"] = {**config.rope_parameters, "partial_rotary_factor": 1.0}
        if architecture is Qwen3MoeConfig:
            fields["num_experts"] = config.n_routed_experts
            fields["mlp_only_layers"] = list(range(config.first_k_dense_replace))
        yield architecture(**fields)


def _shared_fields(architecture: type[PreTrainedConfig]) -> list[str]:
    names = BuddyGPTConfig.__annotations__
    return [name for name in names if name in architecture.__annotations__ or name == "head_dim"]


def _without_expert_fields(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in EXPERT_FIELDS}


def _equivalent_architectures(config: BuddyGPTConfig) -> tuple[type[PreTrainedConfig], ...]:
    """Return the config classes of the architectures that equal a BuddyGPT model, or raise ValueError."""
    has_latent_attention = config.kv_lora_rank is not None
    if config.n_soft_experts is not None:
        raise ValueError("no architecture of transformers has a soft mixture of experts (n_soft_experts)")
    if config.n_routed_experts is None:
        return (DeepseekV3Config,) if has_latent_attention else DENSE[config.attention_bias, config.use_qk_norm]
    if config.scoring_func == "sigmoid":
        return (DeepseekV3Config,) if has_latent_attention else (Glm4MoeConfig,)

    # Softmax scores: only Qwen3-MoE is left.
    obstacles = [
        (has_latent_attention, "no latent attention; DeepSeek-V3 has sigmoid scores, V2 unnormalized ones"),
        (config.n_shared_experts > 0, "no shared experts; Qwen2-MoE gates its own, GLM-4-MoE has sigmoid scores"),
        (not config.use_qk_norm, "normalized queries and keys (use_qk_norm) always"),
        (config.topk_group < config.n_group, "no expert groups (n_group)"),
        (config.routed_scaling_factor != 1, "no routed_scaling_factor"),
    ]
    for is_present, obstacle in obstacles:
        if is_present:
            raise ValueError(f"with softmax scores (scoring_func) it could be Qwen3-MoE only, which has {obstacle}")
    return (Qwen3MoeConfig,)


def buddygpt_config(config: PreTrainedConfig) -> BuddyGPTConfig:
    """Return the config of the BuddyGPT model that equals a stock one.

    Raises:
        ValueError: No BuddyGPT model equals it; the message says why.
        StrictDataclassError: BuddyGPT refuses the sizes.
    """
    architecture = type(config)
    if architecture not in IMPORTABLE:
        supported = ", ".join(known.model_type for known in IMPORTABLE)
        raise ValueError(f"a `{config.model_type}` model cannot become a BuddyGPT one; these can: {supported}")

    # Refuse what BuddyGPT lacks.
    rope = dict(config.rope_parameters)
    rotated = rope.pop("partial_rotary_factor", 1.0)
    sparse_step = getattr(config, "decoder_sparse_step", 1)
    dense_layers = getattr(config, "mlp_only_layers", [])
    dense_layers_are_lowest = sorted(dense_layers) == list(range(len(dense_layers)))
    obstacles = [
        (hasattr(config, "quantization_config"), "is quantized: use the checkpoint in full precision"),
        (getattr(config, "mlp_bias", False), "has biases in its feed-forward layers (mlp_bias); BuddyGPT has none"),
        (_has_sliding_window(config), "has sliding-window attention (sliding_window); BuddyGPT only full attention"),
        (rotated != 1, f"rotates {rotated} of each head (partial_rotary_factor); BuddyGPT rotates all of it"),
        (sparse_step != 1, f"has experts in one of {sparse_step} layers (decoder_sparse_step); BuddyGPT in every one"),
        (not dense_layers_are_lowest, f"has dense layers {dense_layers} (mlp_only_layers) that are not the lowest"),
    ]
    for is_present, obstacle in obstacles:
        if is_present:
            raise ValueError(f"the `{config.model_type}` model {obstacle}")

    # Translate the fields.
    fields = {name: getattr(config, name, None) for name in _shared_fields(architecture)}
    fields["rope_parameters"] = rope
    fields.update(IMPORTABLE[architecture])
    if architecture is Qwen3MoeConfig:
        fields["n_routed_experts"] = config.num_experts
        fields["first_k_dense_replace"] = len(dense_layers)
    if fields.get("first_k_dense_replace", 0) >= config.num_hidden_layers:  # no layer has experts
        fields = _without_expert_fields(fields)
    return BuddyGPTConfig(**fields)


def _has_sliding_window(config: PreTrainedConfig) -> bool:
    if getattr(config, "sliding_window", None) is None:
        return False
    layer_types = getattr(config, "layer_types", None)
    return not layer_types or "sliding_attention" in layer_types


def to_native(model: BuddyGPTForCausalLM) -> PreTrainedModel:
    """Return the usual stock model that equals a BuddyGPT one. Raises as [`native_configs`] and [`convert`] do."""
    return convert(model, next(native_configs(model.config)))


def from_native(model: PreTrainedModel) -> BuddyGPTForCausalLM:
    """Return the BuddyGPT model that equals a stock one. Raises as [`buddygpt_config`] and [`convert`] do."""
    return convert(model, buddygpt_config(model.config))


def convert(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of `config` that shares the tensors (no copies) and generation config of `model`.

    Raises:
        ValueError: `model` has a weight other than 0 that the new architecture lacks.
        RuntimeError: The weights do not fit.
    """
    converted = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = model.state_dict()
    if not getattr(model.config, "rope_interleave", True):
        state = {name: _interleaved(name, weight, config) for name, weight in state.items()}
    if model.config.tie_word_embeddings and not config.tie_word_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()  # `save_pretrained` saves a shared tensor only once

    # Add zeros that only the new architecture has; drop zeros that it lacks.
    expected = converted.state_dict()
    for name in state.keys() ^ expected.keys():
        if not ZERO_IF_ABSENT.search(name):
            continue  # `load_state_dict` reports it
        if name in expected:
            state[name] = torch.zeros_like(expected[name])
            continue
        if state[name].any():
            raise ValueError(f"{name} is not zero, and {type(converted).__name__} has no such weight")
        del state[name]

    # assign=True, because copying would round the selection bias, which stays in float32 in a bfloat16 model.
    converted.load_state_dict(state, strict=True, assign=True)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    return converted


def _interleaved(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Reorder the rows that RoPE rotates, from pairs (i, i + D/2) of each head to pairs (2i, 2i + 1)."""
    if not re.search(r"\.(q_proj|q_b_proj|kv_a_proj_with_mqa)\.", name):
        return weight
    heads = 1 if "kv_a_proj" in name else config.num_attention_heads
    by_head = weight.unflatten(0, (heads, -1))  # (heads, rows of a head, ...)
    unrotated, rotated = by_head.tensor_split([by_head.shape[1] - config.qk_rope_head_dim], dim=1)
    rotated = rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((unrotated, rotated), dim=1).flatten(0, 1)
