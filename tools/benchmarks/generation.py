"""Decoding speed of grouped-query and latent attention, with and without cache and absorption.

python tools/benchmarks/generation.py           # about 2 minutes on two cores
python tools/benchmarks/generation.py --quick   # checks in seconds that it runs
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from ab import Report, alternate, cpu_seconds
from tqdm import tqdm
from training_step import shapes
from transformers import AutoModelForCausalLM, PreTrainedModel

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script


@dataclass
class GenerationArguments:
    rounds: int = field(default=5, metadata={"help": "Measurements of each variant."})
    prompt: int = field(default=256, metadata={"help": "Tokens in the prompt."})
    new_tokens: int = field(default=24, metadata={"help": "Tokens to generate."})
    quick: bool = field(default=False, metadata={"help": "One round of a tiny shape; nothing is written."})


def decode(model: PreTrainedModel, args: GenerationArguments, use_cache: bool = True) -> Callable[[], float]:
    """Return a measurement: tokens per CPU second of greedy decoding with batch 1, including the prompt's time."""
    model = model.eval()
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    lengths = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}

    def generate() -> None:
        model.generate(prompt, do_sample=False, use_cache=use_cache, pad_token_id=0, **lengths)

    return lambda: args.new_tokens / cpu_seconds(generate)


def without_absorption(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model expand keys and values from the latents at every step, as in training."""
    for layer in model.model.layers:
        layer.self_attn.can_absorb = lambda *_: False
    return model


def main() -> None:
    (args,) = parse_arguments(GenerationArguments, description=__doc__)
    if args.quick:
        args.rounds, args.prompt, args.new_tokens = 1, 16, 4
    configs = shapes(args.quick)
    dense, latent = configs["BuddyGPT"], configs["BuddyGPT, latent attention"]
    make = AutoModelForCausalLM.from_config
    variants = {
        "grouped-query attention": decode(make(dense), args),
        "grouped-query, no cache": decode(make(dense), args, use_cache=False),
        "latent attention, absorbed": decode(make(latent), args),
        "latent attention, expanded": decode(without_absorption(make(latent)), args),
        "Qwen3, same dimensions": decode(make(configs["Qwen3"]), args),
    }
    with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
        samples = alternate(variants, args.rounds, progress)
    report = Report("generation", ["variant", "tokens a CPU second", "ratio to the first"])
    report.add_samples(samples, "tokens a CPU second", better="more")
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
