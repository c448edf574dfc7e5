"""Odds ratio preference optimization (arXiv:2403.07691): fine-tuning and preference in one loss, no reference model.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/orpo.py --config rlhf/configs/quickstart-orpo.yaml

It may start from a base model: the loss also raises the likelihood of the chosen answers. Data: rows of `prompt`,
`chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `ORPOConfig` (`--beta 0.1`: weight of
the odds ratio) and `ModelConfig` (`--use_peft true ...`) works here, in the YAML or as `--key value`. An interrupted
run resumes.
"""

from buddygpt.rlhf.pairs import train_on_pairs
from buddygpt.training.run import run_recipe


def main() -> None:
    train_on_pairs("orpo", __doc__)


if __name__ == "__main__":
    run_recipe(main)
