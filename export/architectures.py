"""Which stock transformers architectures a BuddyGPT model equals, and its weights in either form.

`native_configs` and `buddygpt_config` translate configs, `to_native` and `from_native` models. Fields of one name mean
the same on both sides; whatever differs besides is written out here.
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

# (attention_bias, use_qk_norm) -> dense architectures that have them, the usual one first. Llama stands in for Qwen2
# because transformers always reads a tokenizer beside a Qwen2 model with Qwen's own normaliser and pre-tokenizer,
# whatever tokenizer.json says.
DENSE: dict[tuple[bool, bool], tuple[type[PreTrainedConfig], ...]] = {
    (True, False): (Qwen2Config, LlamaConfig),
    (False, True): (Qwen3Config,),
    (True, True): (Qwen3Config,),
    (False, False): (LlamaConfig,),
}
# What a stock architecture adds to the fields that it shares with BuddyGPT.
IMPORTABLE: dict[type[PreTrainedConfig], dict[str, bool | str]] = {
    Qwen2Config: {"attention_bias": True},
    Qwen3Config: {"use_qk_norm": True},
    LlamaConfig: {},
    DeepseekV3Config: {"scoring_func": "sigmoid"},
    Glm4MoeConfig: {"scoring_func": "sigmoid"},
    Qwen3MoeConfig: {"use_qk_norm": True, "scoring_func": "softmax"},
}
EXPERT_FIELDS = (
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
    *("scoring_func", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)
# Weights that change nothing where they are zeros: Qwen3, Llama, DeepSeek-V3 and Qwen3-MoE give o_proj a bias with the
# others, DeepSeek-V3 and GLM-4-MoE always have a shared expert, and Qwen3-MoE never has a selection bias.
ZERO_IF_ABSENT = re.compile(r"\.o_proj\.bias$|\.e_score_correction_bias$|\.shared_experts\.")


def native_configs(config: BuddyGPTConfig) -> Iterator[PreTrainedConfig]:
    """Yield the config of every stock architecture that equals a BuddyGPT model, the usual one first.

    Raises:
        ValueError: None does; the message says why.
        StrictDataclassError: The stock config refuses the sizes.
    """
    for target in _twins(config):
        fields = {name: getattr(config, name) for name in _shared_fields(target)}
        if config.n_routed_experts is None:
            fields = {name: value for name, value in fields.items() if name not in EXPERT_FIELDS}
        if target in (DeepseekV3Config, Glm4MoeConfig):
            dense = config.num_hidden_layers if config.n_routed_experts is None else config.first_k_dense_replace
            fields |= {"n_shared_experts": max(1, config.n_shared_experts), "first_k_dense_replace": dense}
            # vLLM and SGLang read the output head of these two from the checkpoint, tied or not.
            fields |= {"tie_word_embeddings": False, "num_mtp_layers": 0}
        if target is Glm4MoeConfig:
            fields["rope_parameters"] = config.rope_parameters | {"partial_rotary_factor": 1.0}
        if target is Qwen3MoeConfig:
            fields |= {"num_experts": config.n_routed_experts}
            fields |= {"mlp_only_layers": list(range(config.first_k_dense_replace))}
        yield target(**fields)


def _shared_fields(stock: type[PreTrainedConfig]) -> list[str]:
    return [name for name in BuddyGPTConfig.__annotations__ if name in stock.__annotations__ or name == "head_dim"]


def _twins(config: BuddyGPTConfig) -> tuple[type[PreTrainedConfig], ...]:
    if config.n_soft_experts is not None:
        raise ValueError("no architecture of transformers has a soft mixture of experts (n_soft_experts)")
    if config.n_routed_experts is None:
        dense = DENSE[config.attention_bias, config.use_qk_norm]
        return dense if config.kv_lora_rank is None else (DeepseekV3Config,)
    if config.scoring_func == "sigmoid":
        return (Glm4MoeConfig,) if config.kv_lora_rank is None else (DeepseekV3Config,)
    obstacles = (
        (config.kv_lora_rank is not None, "no latent attention; DeepSeek-V3 has sigmoid scores, V2 unnormalised ones"),
        (config.n_shared_experts > 0, "no shared experts; Qwen2-MoE gates its, GLM-4-MoE has sigmoid scores"),
        (not config.use_qk_norm, "normalised queries and keys (use_qk_norm) always"),
        (config.topk_group < config.n_group, "no expert groups (n_group)"),
        (config.routed_scaling_factor != 1, "no routed_scaling_factor"),
    )
    for present, obstacle in obstacles:
        if present:
            raise ValueError(f"softmax scores (scoring_func) leave Qwen3-MoE only, which has {obstacle}")
    return (Qwen3MoeConfig,)


def buddygpt_config(config: PreTrainedConfig) -> BuddyGPTConfig:
    """Return the config of the BuddyGPT model that equals a stock one.

    Raises:
        ValueError: There is none; the message says why.
        StrictDataclassError: The numbers do not fit together for BuddyGPT.
    """
    if type(config) not in IMPORTABLE:
        supported = ", ".join(known.model_type for known in IMPORTABLE)
        raise ValueError(f"a `{config.model_type}` model cannot become a BuddyGPT one; these can: {supported}")
    rope = dict(config.rope_parameters)
    rotated = rope.pop("partial_rotary_factor", 1.0)
    sparse, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", [])
    obstacles = (
        (hasattr(config, "quantization_config"), "is quantised: give the checkpoint in full precision"),
        (getattr(config, "mlp_bias", False), "has biases in its feed-forward layers (mlp_bias), BuddyGPT none"),
        (_slides(config), "has sliding-window attention (sliding_window), BuddyGPT only full attention"),
        (rotated != 1, f"rotates {rotated} of each head (partial_rotary_factor), BuddyGPT all of it"),
        (sparse != 1, f"has experts in one of {sparse} layers (decoder_sparse_step), BuddyGPT in every one"),
        (sorted(dense) != [*range(len(dense))], f"has dense layers {dense} (mlp_only_layers), not the first ones"),
    )
    for present, obstacle in obstacles:
        if present:
            raise ValueError(f"the `{config.model_type}` model {obstacle}")
    fields = {name: getattr(config, name, None) for name in _shared_fields(type(config))}
    fields |= {"rope_parameters": rope} | IMPORTABLE[type(config)]
    if type(config) is Qwen3MoeConfig:
        fields |= {"n_routed_experts": config.num_experts, "first_k_dense_replace": len(dense)}
    if fields.get("first_k_dense_replace", 0) >= config.num_hidden_layers:
        fields = {name: value for name, value in fields.items() if name not in EXPERT_FIELDS}
    return BuddyGPTConfig(**fields)


def _slides(config: PreTrainedConfig) -> bool:
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) is not None and "sliding_attention" in layers


def to_native(model: BuddyGPTForCausalLM) -> PreTrainedModel:
    """Return the usual stock model that equals a BuddyGPT one. Raises as [`native_configs`] and [`convert`]."""
    return convert(model, next(native_configs(model.config)))


def from_native(model: PreTrainedModel) -> BuddyGPTForCausalLM:
    """Return the BuddyGPT model that equals a stock one. Raises as [`buddygpt_config`] and [`convert`]."""
    return convert(model, buddygpt_config(model.config))


def convert(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of `config` with the generation config and the very tensors (not copies) of `model`.

    Raises:
        ValueError: `model` has a weight other than 0 that the new architecture lacks.
        RuntimeError: The weights do not fit.
    """
    twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = model.state_dict()
    if not getattr(model.config, "rope_interleave", True):
        state = {name: _interleaved(name, weight, config) for name, weight in state.items()}
    if model.config.tie_word_embeddings and not config.tie_word_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()  # a shared tensor would be saved once
    places = twin.state_dict()
    for name in filter(ZERO_IF_ABSENT.search, state.keys() ^ places.keys()):
        if name in places:
            state[name] = torch.zeros_like(places[name])
        elif state.pop(name).any():
            raise ValueError(f"{name} is not zero, and {type(twin).__name__} has no such weight")
    # Assigned, because copying would round the selection bias, which stays in float32 in a bfloat16 model.
    twin.load_state_dict(state, strict=True, assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin


def _interleaved(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Reorder the rows that RoPE rotates from pairs (i, i + D/2) of each head to pairs (2i, 2i + 1)."""
    if not re.search(r"\.(q_proj|q_b_proj|kv_a_proj_with_mqa)\.", name):
        return weight
    heads = 1 if "kv_a_proj" in name else config.num_attention_heads
    by_head = weight.unflatten(0, (heads, -1))
    still, rotated = by_head.tensor_split([by_head.shape[1] - config.qk_rope_head_dim], dim=1)
    rotated = rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((still, rotated), dim=1).flatten(0, 1)
