"""SimPO (arXiv:2405.14734): preference by the mean log-probability per token and a margin, no reference model.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/simpo.py \
        --config rlhf/configs/quickstart-simpo.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `CPOConfig`
and `ModelConfig` (`--use_peft true ...`) works here, in the YAML or as `--key value`: `simpo_gamma` is the margin,
`cpo_alpha` adds the likelihood of the chosen answers (CPO-SimPO), `alpha` is that of AlphaPO, and `loss_type sigmoid`
with `cpo_alpha 1` is CPO. An interrupted run resumes.
"""

from buddygpt.rlhf.pairs import train_on_pairs
from buddygpt.training.run import run_recipe


def main() -> None:
    train_on_pairs("simpo", __doc__, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)


if __name__ == "__main__":
    run_recipe(main)
