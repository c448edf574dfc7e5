"""Reinforcement learning of a chat model from rewards that can be verified: GRPO (arXiv:2402.03300), DAPO, RLOO.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/grpo.py --config rlhf/configs/quickstart-grpo.yaml

Each step samples `num_generations` answers to each question, rewards them (rlhf/README.md lists the rewards), and
makes those above the average of their question more likely. Data: rows of `prompt` and `answer`, or instructions,
whose last answer is the right one (see data/chat/prompts.py). `--algorithm grpo` takes every option of TRL's
`GRPOConfig`, such as `--loss_type dapo`, and `--algorithm rloo` those of `RLOOConfig`. An interrupted run resumes.
"""

from dataclasses import dataclass, field
from typing import Literal

from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
)

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments, read_option
from buddygpt.cli.errors import UserError
from buddygpt.data.chat.prompt_batches import PromptsWithTools
from buddygpt.data.chat.prompts import load_prompts
from buddygpt.rlhf.reward_arguments import RewardArguments, build_rewards, find_needs, require_rewards
from buddygpt.training.generation import room_for_prompts
from buddygpt.training.limits import require_choices
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, trainer_options


@dataclass
class AlgorithmArguments:
    algorithm: Literal["grpo", "rloo"] = field(
        default="grpo", metadata={"help": "grpo, with `loss_type` grpo, dapo, dr_grpo, ...; or rloo."}
    )


class GRPO(PromptsWithTools, GRPOTrainer):
    pass


class RLOO(PromptsWithTools, RLOOTrainer):
    pass


# What trl/trainer/grpo_trainer.py knows.
CHOICES = {
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
ALGORITHMS = {"grpo": (GRPOConfig, GRPO), "rloo": (RLOOConfig, RLOO)}


def main() -> None:
    config_class, trainer_class = ALGORITHMS.get(str(read_option("algorithm")), ALGORITHMS["grpo"])
    args, reward_args, algorithm_args, training_args, model_args = parse_arguments(
        *(TuningArguments, RewardArguments, AlgorithmArguments, config_class, ModelConfig),
        description=__doc__,
        defaults=recipe_defaults(),
    )
    require_choices(training_args, CHOICES)
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
    require_whole_groups(training_args, len(train_rows), has_eval=eval_rows is not None)
    model_options = {"dtype": model_args.dtype, "trust_remote_code": training_args.trust_remote_code}
    reward_funcs = build_rewards(reward_args, tokenizer, **model_options)
    with building("trainer"):
        options = trainer_options(model_args, training_args, tokenizer)
        trainer = trainer_class(reward_funcs=reward_funcs, train_dataset=train_rows, eval_dataset=eval_rows, **options)
    run_card = describe_run(algorithm_args.algorithm, args, model_args)
    run_card["arguments"] = vars(args) | vars(reward_args)
    run_training(trainer, chat_prompts(args.sample_prompts), run_card)


def require_whole_groups(training_args: GRPOConfig | RLOOConfig, rows: int, has_eval: bool) -> None:
    """Raise UserError if a step needs more questions than there are, or an evaluation would split their answers."""
    questions = training_args.generation_batch_size // training_args.num_generations
    if rows < questions:
        raise UserError(f"there are {rows} rows, fewer than the {questions} questions of a step")
    # There is also an evaluation at the end; TRL only checks this if `eval_strategy` is not no.
    answers = training_args.num_generations_eval or training_args.num_generations
    batch = training_args.per_device_eval_batch_size * training_args.world_size
    if has_eval and batch % answers:
        raise UserError(
            f"per_device_eval_batch_size x processes is {batch}, no multiple of the {answers} answers to a question "
            "(num_generations_eval, else num_generations); change one of them"
        )


if __name__ == "__main__":
    run_recipe(main)
