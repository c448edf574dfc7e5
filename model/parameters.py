"""Print parameter counts and key/value cache sizes of presets, config files and checkpoints as a Markdown table.

python -m buddygpt.model.parameters                                    # every preset
python -m buddygpt.model.parameters buddygpt-0.1b --vocab_size 16384   # the same body with a smaller vocabulary
python -m buddygpt.model.parameters path/to/config.json path/to/checkpoint

The models are built on the meta device, which allocates no weights.
"""

import argparse
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .configuration_buddygpt import BuddyGPTConfig
from .presets import PRESETS, load_config

HEADER = (
    "name",
    "attention",
    "feed-forward",
    "layers x width",
    "vocabulary",
    "total",
    "non-embedding",
    "active",
    "embedding share",
    "cache bytes per token",
)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: All parameters, a tied embedding once. Buffers (the experts' selection bias) are not parameters.
        non_embedding: `total` without the embedding and the output head.
        active: `total` without the routed experts that a token does not use.
    """

    total: int
    non_embedding: int
    active: int


def count_parameters(config: PreTrainedConfig) -> ParameterCount:
    """Count the parameters of the causal language model of `config`, a BuddyGPT or stock config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()

    # A set, because a tied embedding and head are one tensor.
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    embedding_size = sum(weight.numel() for weight in embeddings)

    # A token uses num_experts_per_tok experts of each MoE layer; the others are idle.
    idle = 0
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            idle_experts = module.num_experts - config.num_experts_per_tok
            expert_size = sum(parameter.numel() for parameter in module.parameters()) // module.num_experts
            idle += idle_experts * expert_size
    return ParameterCount(total=total, non_embedding=total - embedding_size, active=total - idle)


def cache_bytes_per_token(config: BuddyGPTConfig, element_size: int = 2) -> int:
    """Return the bytes that the key/value cache needs for each token of a sequence.

    Args:
        config: With `kv_lora_rank` a layer caches a latent and one rotated key; without it, all keys and values.
        element_size: Bytes per number; 2 for bfloat16.
    """
    if config.kv_lora_rank is None:
        numbers = 2 * config.num_key_value_heads * config.head_dim
    else:
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * numbers * element_size


def describe_attention(config: BuddyGPTConfig) -> str:
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    if config.kv_lora_rank is not None:
        return f"MLA {heads}, rank {config.kv_lora_rank}"
    if heads == key_value_heads:
        return f"MHA {heads}"
    return f"GQA {heads}/{key_value_heads}"


def describe_feed_forward(config: BuddyGPTConfig) -> str:
    if config.n_soft_experts is not None:
        return f"{config.n_soft_experts} soft experts of {config.moe_intermediate_size}"
    if config.n_routed_experts is None:
        return f"dense {config.intermediate_size}"
    text = f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, top-{config.num_experts_per_tok}"
    if config.n_shared_experts:
        text += f" + {config.n_shared_experts} shared"
    if config.first_k_dense_replace:
        text += f"; first {config.first_k_dense_replace} dense {config.intermediate_size}"
    return text


def describe(name: str, config: BuddyGPTConfig) -> list[str]:
    """Return one row of the table, in the order of `HEADER`."""
    count = count_parameters(config)
    return [
        name,
        describe_attention(config),
        describe_feed_forward(config),
        f"{config.num_hidden_layers} x {config.hidden_size}",
        f"{config.vocab_size:,}",
        f"{count.total / 1e6:.2f}M",
        f"{count.non_embedding / 1e6:.2f}M",
        f"{count.active / 1e6:.2f}M",
        f"{1 - count.non_embedding / count.total:.1%}",
        f"{cache_bytes_per_token(config):,}",
    ]


def load_buddygpt_config(name_or_path: str, **overrides) -> BuddyGPTConfig:
    """Call [`load_config`]; raise ValueError if the result is not a BuddyGPT config."""
    config = load_config(name_or_path, **overrides)
    if not isinstance(config, BuddyGPTConfig):
        raise ValueError(f"{name_or_path} is a {config.model_type} model, not a BuddyGPT model")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m buddygpt.model.parameters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="*", default=sorted(PRESETS), metavar="NAME_OR_PATH", help="default: all presets"
    )
    parser.add_argument("--vocab_size", type=int, help="rows of the embedding; default: as in the config")
    parser.error = lambda message: parser.exit(2, f"error: {message}. See --help.\n")
    args = parser.parse_args()

    overrides = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    try:
        rows = [describe(name, load_buddygpt_config(name, **overrides)) for name in args.models]
    except Exception as error:  # transformers and torch raise many kinds for odd configs
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")

    # model/ imports nothing else of this project, so it prints the Markdown table itself.
    for row in (HEADER, ["---"] * len(HEADER), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
