"""Odds ratio preference optimization (arXiv:2403.07691): fine-tuning and preference in one loss, no reference model.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/orpo.py --config rlhf/configs/quickstart-orpo.yaml

It may start from a base model: the loss also raises the likelihood of the chosen answers. Data: rows of `prompt`,
`chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `ORPOConfig` (`--beta 0.1`: weight of
the odds ratio) and `ModelConfig` (`--use_peft true ...`) works here, in the YAML or as `--key value`. An interrupted
run resumes.
"""

from trl import ModelConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.rlhf.pairs import ORPOConfig, TokenizedORPOTrainer, train_on_pairs
from buddygpt.training.run import recipe_defaults, run_recipe
from buddygpt.training.tuning import TuningArguments


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, ORPOConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    train_on_pairs("orpo", TokenizedORPOTrainer, args, training_args, model_args)


if __name__ == "__main__":
    run_recipe(main)
