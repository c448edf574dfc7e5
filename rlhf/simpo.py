"""SimPO (arXiv:2405.14734): preference by the mean log-probability per token and a margin, no reference model.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/simpo.py \
        --config rlhf/configs/quickstart-simpo.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `CPOConfig`
and `ModelConfig` (`--use_peft true ...`) works here, in the YAML or as `--key value`: `simpo_gamma` is the margin,
`cpo_alpha` adds the likelihood of the chosen answers (CPO-SimPO), `alpha` is that of AlphaPO, and `loss_type sigmoid`
with `cpo_alpha 1` is CPO. An interrupted run resumes.
"""

from trl import ModelConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.rlhf.pairs import CPOConfig, TokenizedCPOTrainer, train_on_pairs
from buddygpt.training.run import recipe_defaults, run_recipe
from buddygpt.training.tuning import TuningArguments

DEFAULTS = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, CPOConfig, ModelConfig, description=__doc__, defaults=recipe_defaults() | DEFAULTS
    )
    train_on_pairs("simpo", TokenizedCPOTrainer, args, training_args, model_args)


if __name__ == "__main__":
    run_recipe(main)
