"""Kahneman-Tversky optimization (arXiv:2402.01306) of a chat model: answers that are labeled good or bad, not pairs.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/kto.py --config rlhf/configs/quickstart-kto.yaml

Data: rows of `prompt`, `completion`, `label` (make them with data/convert_chat.py, also from pairs). Every option of
TRL's `KTOConfig` (`--loss_type apo_zero_unpaired`, `--undesirable_weight 2`, ...) and `ModelConfig` (`--use_peft true
...`) works here, in the YAML or as `--key value`. An interrupted run resumes.
"""

import sys

from datasets import Dataset
from trl import KTOConfig, KTOTrainer, ModelConfig

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.data.chat.load import load_rows
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, load_both, trainer_options


class TokenizedKTOTrainer(KTOTrainer):
    """Takes rows that are tokenized already, whose answers end with their end mark (see data/chat/tokens.py)."""

    def _prepare_dataset(self, dataset: Dataset, processing_class, args: KTOConfig, dataset_name: str) -> Dataset:
        if not self.calculate_KL:
            return dataset
        return dataset.map(rotate_answers, batched=True, batch_size=args.per_device_train_batch_size)


def rotate_answers(batch: dict[str, list]) -> dict[str, list]:
    """Add the answer to another question of the same batch, from which the loss estimates the KL divergence."""
    return {"KL_completion_ids": batch["completion_ids"][-1:] + batch["completion_ids"][:-1]}


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, KTOConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    tokenizer = prepare_for_trl(model_args, training_args)
    train_rows, eval_rows = load_both(load_rows, "kto", args, training_args, model_args, tokenizer)
    check_balance(train_rows["label"][:], training_args)
    # Batches that stay together are read in the order of the rows: without shuffling, in that of the file.
    train_rows = train_rows.shuffle(seed=training_args.seed)
    with building("trainer"):
        options = trainer_options(model_args, training_args, tokenizer)
        trainer = TokenizedKTOTrainer(train_dataset=train_rows, eval_dataset=eval_rows, **options)
    run_training(trainer, chat_prompts(args.sample_prompts), describe_run("kto", args, model_args))


def check_balance(labels: list[bool], args: KTOConfig) -> None:
    """Warn if good and bad answers weigh differently: the paper advises a ratio of 1 to 1.33 (equation 8).

    Raises:
        UserError: All answers have the same label.
    """
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad:
        remedy = "fine-tune on them with sft/sft.py" if good else "add good ones"
        raise UserError(f"all {len(labels):,} answers are labeled {'good' if good else 'bad'}; {remedy}")
    if not args.desirable_weight or not args.undesirable_weight:  # those answers are left out on purpose
        return
    ratio = good * args.desirable_weight / (bad * args.undesirable_weight)
    if not 0.99 <= ratio <= 1.34 and args.process_index == 0:
        print(
            f"warning: {good:,} good and {bad:,} bad answers weigh {ratio:.2f} to 1, best is 1 to 1.33 to 1: set "
            f"desirable_weight to {args.desirable_weight / ratio:.3g}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_recipe(main)
