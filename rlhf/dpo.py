"""Direct preference optimization (arXiv:2305.18290) of a chat model, all parameters or LoRA.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/dpo.py --config rlhf/configs/quickstart.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `DPOConfig`
(`--precompute_ref_log_probs true`, `--loss_type ...`) and `ModelConfig` (`--use_peft true ...`) works here, in the
YAML or as `--key value`. An interrupted run resumes.
"""

from trl import DPOConfig, ModelConfig

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.data.chat.load import load_rows
from buddygpt.rlhf.dpo_trainer import TokenizedDPOTrainer, require_losses_that_go_together
from buddygpt.training.limits import require_choices
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, load_both, trainer_options

# What trl/trainer/dpo_trainer.py knows.
CHOICES = {
    "loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, DPOConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    require_choices(training_args, CHOICES)
    require_losses_that_go_together(training_args)
    tokenizer = prepare_for_trl(model_args, training_args)
    train_rows, eval_rows = load_both(load_rows, "preference", args, training_args, model_args, tokenizer)
    # TRL computes the loss of both answers (trl/trainer/dpo_trainer.py), with a frozen copy as the reference model.
    with building("trainer"):
        options = trainer_options(model_args, training_args, tokenizer)
        trainer = TokenizedDPOTrainer(train_dataset=train_rows, eval_dataset=eval_rows, **options)
    run_training(trainer, chat_prompts(args.sample_prompts), describe_run("dpo", args, model_args))


if __name__ == "__main__":
    run_recipe(main)
