"""Reinforcement learning of a chat model from rewards that can be verified: GRPO (arXiv:2402.03300), DAPO, RLOO.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/grpo.py --config rlhf/configs/quickstart-grpo.yaml

Each step samples `num_generations` answers to each question, rewards them (rlhf/README.md lists the rewards), and
makes those above the average of their question more likely. Data: rows of `prompt` and `answer`, or instructions,
whose last answer is the right one (see data/chat/prompts.py). `--algorithm grpo` takes every option of TRL's
`GRPOConfig`, such as `--loss_type dapo`, and `--algorithm rloo` those of `RLOOConfig`. An interrupted run resumes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
import yaml
from torch.utils.data import Sampler
from transformers import AutoConfig
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    get_peft_config,
    get_quantization_config,
)

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.data.chat.prompts import load_prompts, render_prompt
from buddygpt.rlhf.reward_arguments import RewardArguments, build_rewards, find_needs, require_rewards
from buddygpt.training.run import (
    building,
    prepare_for_trl,
    recipe_defaults,
    require_positions,
    run_recipe,
    run_training,
)
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run


@dataclass
class AlgorithmArguments:
    algorithm: Literal["grpo", "rloo"] = field(
        default="grpo", metadata={"help": "grpo, with `loss_type` grpo, dapo, dr_grpo, ...; or rloo."}
    )


class OrderOfEpoch(Sampler):
    """The order of a `RepeatSampler`, shuffled by the number of the epoch, so that a resumed run continues it."""

    def __init__(self, sampler, trainer):
        self.sampler = sampler
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.trainer.state.epoch or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class PromptsWithTools:
    """Gives the tools of each row to the chat template; TRL only knows tools that it runs itself."""

    def _get_train_sampler(self, dataset=None) -> Sampler:
        return OrderOfEpoch(super()._get_train_sampler(dataset), self)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.tools_of_rows = [row["tools"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[list[dict[str, Any]]]) -> tuple[list[list[int]], None, dict]:
        ids = []
        for prompt, tools in zip(prompts, self.tools_of_rows, strict=True):
            ids.append(render_prompt(prompt, tools, self.processing_class, **self.chat_template_kwargs))
        return ids, None, {}


class GRPO(PromptsWithTools, GRPOTrainer):
    pass


class RLOO(PromptsWithTools, RLOOTrainer):
    pass


# TRL refuses other names only after the first step has begun (trl/trainer/grpo_trainer.py).
CHOICES = {
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
ALGORITHMS = {"grpo": (GRPOConfig, GRPO), "rloo": (RLOOConfig, RLOO)}


def main() -> None:
    config_class, trainer_class = ALGORITHMS[read_algorithm()]
    args, reward_args, algorithm_args, training_args, model_args = parse_arguments(
        *(TuningArguments, RewardArguments, AlgorithmArguments, config_class, ModelConfig),
        description=__doc__,
        defaults=recipe_defaults(),
    )
    for key, choices in CHOICES.items():
        if getattr(training_args, key, choices[0]) not in choices:
            raise UserError(f"`{key}` is {getattr(training_args, key)}, must be one of {', '.join(choices)}")
    require_rewards(reward_args, training_args.reward_weights)
    tokenizer = prepare_for_trl(model_args, training_args)
    options = {
        "tokenizer": tokenizer,
        "max_length": room_for_prompts(model_args, training_args),
        "needs": find_needs(reward_args),
        "benchmarks": args.exams,
        "force": args.train_on_unfit_data,
    }
    train_rows = load_prompts(args.train_files, **options)
    eval_rows = load_prompts(args.eval_files, **options) if args.eval_files else None
    questions = training_args.generation_batch_size // training_args.num_generations
    if len(train_rows) < questions:
        raise UserError(f"there are {len(train_rows)} rows, fewer than the {questions} questions of a step")
    model_options = {"dtype": model_args.dtype, "trust_remote_code": training_args.trust_remote_code}
    reward_funcs = build_rewards(reward_args, tokenizer, **model_options)
    with building("trainer"):
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )
    run_card = describe_run(algorithm_args.algorithm, args, model_args)
    run_card["arguments"] = vars(args) | vars(reward_args)
    run_training(trainer, chat_prompts(args.sample_prompts), run_card)


def read_algorithm() -> str:
    """Return `--algorithm`, or `algorithm` of the config file: it decides which other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--algorithm")
    words, _ = parser.parse_known_args()
    algorithm = words.algorithm
    if algorithm is None and words.config:
        try:
            with open(words.config, encoding="utf-8") as file:
                algorithm = yaml.safe_load(file).get("algorithm")
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # the parser of all arguments says what is wrong
            pass
    return algorithm if algorithm in ALGORITHMS else "grpo"


def room_for_prompts(model_args: ModelConfig, training_args: GRPOConfig | RLOOConfig) -> int | None:
    """Return the tokens that an answer leaves of the model's positions; None if the model has no limit.

    Raises:
        UserError: An answer may have any length, or has no room; or vLLM cannot generate it.
    """
    length = training_args.max_completion_length
    if length is None:
        raise UserError("give max_completion_length: the most tokens of an answer")
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name, trust_remote_code=training_args.trust_remote_code)
    if getattr(training_args, "use_vllm", False):
        if config.model_type == "buddygpt":
            raise UserError("use_vllm: vLLM does not know BuddyGPT; train the native form (export/to_native.py)")
        if not find_spec("vllm"):
            raise UserError("use_vllm: true needs vLLM: pip install vllm, or set use_vllm: false")
    changes = training_args.model_init_kwargs or {}
    limit = changes.get("max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    require_positions("max_completion_length", length, limit)
    return None if limit is None else limit - length


if __name__ == "__main__":
    run_recipe(main)
