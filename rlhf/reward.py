"""A reward model: a language model with one score in place of the output head, trained to tell better from worse.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/reward.py \
        --config rlhf/configs/quickstart-reward.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). The loss is that of Bradley and
Terry: the chosen answer should score higher. Every option of TRL's `RewardConfig` and `ModelConfig` works here, in the
YAML or as `--key value`; `--use_peft true ...` trains an adapter and the whole score. `run.json` has the accuracy on
each file of `eval_files`. rlhf/grpo.py takes the folder as one of its `rewards`. An interrupted run resumes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

import buddygpt.model  # noqa: F401  registers the model with AutoModelForSequenceClassification
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, find_files
from buddygpt.data.chat.load import load_rows
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, describe_run, load_both, row_options, trainer_options


@dataclass
class CollatorWithSource(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "source" in examples[0]:
            batch["source"] = torch.tensor([example["source"] for example in examples])
        return batch


class RewardTrainerBySource(RewardTrainer):
    """Also reports the accuracy of each source of evaluation rows (weighed in training/evaluation.py)."""

    sources: tuple[str, ...] = ()  # names, in the order of their numbers

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "source"]

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None) -> Any:
        source = inputs.pop("source", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if source is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            for number, name in enumerate(self.sources):
                own = source == number
                right = (chosen > rejected) & own
                counts = self.accelerator.reduce(torch.stack([right.sum(), own.sum()]), "sum")
                self._metrics["eval"][f"accuracy/{name}"].append((counts[0] / counts[1].clamp(min=1)).item())
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, RewardConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    if args.sample_prompts:
        raise UserError("sample_prompts: a reward model scores answers and writes none; remove it")
    tokenizer = prepare_for_trl(model_args, training_args)
    training_args.model_init_kwargs["num_labels"] = 1
    train_rows, _ = load_both(
        load_rows, "preference", replace(args, eval_files=[]), training_args, model_args, tokenizer
    )
    sources, eval_rows = load_sources(args, training_args, tokenizer) if args.eval_files else ((), None)
    with building("trainer"):
        trainer = RewardTrainerBySource(
            data_collator=CollatorWithSource(tokenizer.pad_token_id, training_args.pad_to_multiple_of),
            train_dataset=keep_whole(train_rows, training_args.max_length),
            eval_dataset=keep_whole(eval_rows, training_args.max_length) if args.eval_files else None,
            **trainer_options(model_args, training_args, tokenizer),
        )
    trainer.sources = sources  # of the evaluation
    run_training(trainer, [], describe_run("reward", args, model_args))


def load_sources(
    args: TuningArguments, training_args: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, ...], Dataset]:
    """Return the names of the evaluation files, and their rows with the number of the file as `source`."""
    files = find_files(args.eval_files, ROW_TYPES)
    names = tuple(file.stem for file in files)
    if len(set(names)) < len(names):
        names = tuple(map(str, files))
    options = row_options(args, training_args, tokenizer, evaluation=True)
    sets = []
    with training_args.main_process_first(desc="reading the rows"):  # the others read its cache
        for number, file in enumerate(files):
            rows = load_rows([str(file)], "preference", **options)
            sets.append(rows.add_column("source", [number] * len(rows)))
    return names, concatenate_datasets(sets)


def keep_whole(rows: Dataset, max_length: int | None) -> Dataset:
    """Join each question and answer; leave pairs out that are too long, because half an answer has another worth."""
    rows = rows.map(join_answers, remove_columns=[key for key in rows.column_names if key != "source"])
    if max_length is None:
        return rows
    whole = rows.filter(lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length)
    if not len(whole):
        raise UserError(f"all {len(rows):,} pairs are longer than max_length {max_length:,}")
    if len(whole) < len(rows):
        dropped = len(rows) - len(whole)
        print(f"warning: {dropped:,} of {len(rows):,} pairs are longer than max_length {max_length:,} and left out")
    return whole


def join_answers(row: dict[str, Any]) -> dict[str, list[int]]:
    return {key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")}


if __name__ == "__main__":
    run_recipe(main)
