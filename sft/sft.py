"""Supervised fine-tuning on chat data: loss on the assistant's turns, all parameters or LoRA.

    accelerate launch --config_file accelerate_configs/cpu.yaml sft/sft.py --config sft/configs/quickstart.yaml

Data: rows of `messages` (make them with data/convert_chat.py). Every option of TRL's `SFTConfig` and `ModelConfig`
(`--use_peft true --lora_r 16 ...`) works here, in the YAML or as `--key value`. An interrupted run resumes.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, SFTConfig

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.thoughts import PARTS
from buddygpt.training.packed_rows import PackedRowsTrainer
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, load_both, trainer_options


@dataclass
class SFTArguments(TuningArguments):
    loss_on: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts of the answers that carry loss, of thoughts, calls and text. Default: all."},
    )

    def __post_init__(self) -> None:
        if not self.loss_on or not set(self.loss_on) <= set(PARTS):
            raise ValueError(f"loss_on is {self.loss_on}; give one or more of {', '.join(PARTS)}")


def main() -> None:
    args, training_args, model_args = parse_arguments(
        SFTArguments, SFTConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    tokenizer = prepare_for_trl(model_args, training_args)
    options = {"loss_on": args.loss_on}
    train_rows, eval_rows = load_both(load_rows, "sft", args, training_args, model_args, tokenizer, **options)
    # TRL replaces the model's forward pass and computes the loss itself (trl/trainer/sft_trainer.py, compute_loss).
    with building("trainer"):
        options = trainer_options(model_args, training_args, tokenizer)
        trainer = PackedRowsTrainer(train_dataset=train_rows, eval_dataset=eval_rows, **options)
    run_training(trainer, chat_prompts(args.sample_prompts), describe_run("sft", args, model_args))


if __name__ == "__main__":
    run_recipe(main)
