"""Weights of a stock model under the names and in the layout of llama.cpp, and back."""

from collections.abc import Iterator

import gguf
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from buddygpt.cli.errors import UserError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,  # the V2 graph runs V3, too
}
# model type -> biases that transformers adds with `attention_bias` and llama.cpp does not read.
BIASES_TO_DROP = {
    "qwen3": ("o_proj.bias",),
    "qwen3_moe": ("o_proj.bias",),
    "deepseek_v3": ("q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"),
}


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's name and the float32 values of every weight.

    Raises:
        UserError: llama.cpp has no place for a weight.
    """
    config = model.config
    names = _tensor_names(config)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embedding if there is no output.weight
        if name.endswith(BIASES_TO_DROP.get(config.model_type, ())):
            if weight.any():
                raise UserError(f"`{name}` is not zero, and llama.cpp's {config.model_type} has no such bias")
            continue
        for part, values in _split(name, weight, config).items():
            gguf_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise UserError(f"`{name}` has no place in llama.cpp's {config.model_type}")
            yield gguf_name, values.float()


def weights(model: PreTrainedModel, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict for `model` from the tensors of a GGUF file: the inverse of [`tensors`].

    Args:
        model: A model of the same config as the written one.
        stored: llama.cpp's name -> values.

    Raises:
        KeyError: A tensor is missing in `stored`.
    """
    config = model.config
    names = _tensor_names(config)
    state = {}
    for name, weight in model.state_dict().items():
        if name.endswith(BIASES_TO_DROP.get(config.model_type, ())):
            state[name] = torch.zeros_like(weight)
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            state[name] = stored["token_embd.weight"]
            continue
        parts = [stored[names.get_name(part, (".weight", ".bias"))] for part in _split(name, weight, config)]
        state[name] = _join(name, parts)
    return state


def _tensor_names(config: PreTrainedConfig) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)


def _split(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return the tensors that llama.cpp has for one weight of transformers, under names that `gguf` knows."""
    if name.endswith("experts.gate_up_proj"):  # (experts, 2 x width, hidden)
        gate, up = weight.chunk(2, dim=1)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": weight}
    if name.endswith("e_score_correction_bias"):
        return {name.replace("_bias", ".bias"): weight}
    if name.endswith("kv_b_proj.weight"):  # llama.cpp multiplies queries by the keys' half and attends to the latents
        by_head = weight.unflatten(0, (config.num_attention_heads, -1))
        keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return {name.replace("kv_b", "k_b"): keys.transpose(1, 2), name.replace("kv_b", "v_b"): values}
    if config.model_type == "llama" and ".q_proj." in name:
        return {name: permute(weight, config.num_attention_heads)}
    if config.model_type == "llama" and ".k_proj." in name:
        return {name: permute(weight, config.num_key_value_heads)}
    return {name: weight}


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Undo [`_split`] for the architectures that transformers does not read from a GGUF file; Llama is not one."""
    if name.endswith("experts.gate_up_proj"):
        return torch.cat(parts, dim=1)
    if name.endswith("kv_b_proj.weight"):
        keys, values = parts
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
    return parts[0]


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q_proj or k_proj, (heads x head_dim, ...), for llama.cpp's RoPE.

    Its `llama` architecture rotates the pairs (2i, 2i + 1) of a head; its Qwen architectures rotate (i, i + D/2), as
    transformers does.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
