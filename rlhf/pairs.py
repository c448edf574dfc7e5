"""What rlhf/orpo.py and rlhf/simpo.py share: TRL's experimental trainers of pairs, on rows that are tokenized already.

These trainers need no reference model. They take a model instead of its name, and tokenize chats by themselves, with
tokens after the end mark and a loss on them; here they get the tokens of data/chat/tokens.py instead.
"""

import os
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.data.chat.load import IGNORED, load_rows
from buddygpt.training.run import building, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, load_both

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # requirements.txt pins the version that is tested
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class TokenizedORPOTrainer(ORPOTrainer):
    """ORPO with the likelihood term of the paper: of the answer, a mean over pairs. TRL's includes the question."""

    @staticmethod
    def tokenize_row(row: dict[str, Any]) -> dict[str, Any]:
        return row

    def concatenated_forward(self, model, batch: dict[str, Any]) -> tuple:
        chosen, rejected, chosen_logits, rejected_logits, _, *balance = super().concatenated_forward(model, batch)
        return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean(), *balance


class TokenizedCPOTrainer(CPOTrainer):
    """CPO and SimPO whose likelihood term is a mean over pairs. TRL's is one over the tokens of a micro-batch."""

    @staticmethod
    def tokenize_row(row: dict[str, Any]) -> dict[str, Any]:
        return row

    def concatenated_forward(self, model, batch: dict[str, Any]) -> tuple:
        chosen, rejected, chosen_logits, rejected_logits, likelihood, *balance = super().concatenated_forward(
            model, batch
        )
        if self.cpo_alpha:
            tokens = (batch["chosen_labels"][:, 1:] != IGNORED).sum(1)
            is_mean = self.loss_type in ("ipo", "simpo")  # of each answer already; a sum for the other losses
            likelihood = -(chosen if is_mean else chosen / tokens).mean()
        return chosen, rejected, chosen_logits, rejected_logits, likelihood, *balance


def train_on_pairs(
    recipe: str,
    trainer_class: type[TokenizedORPOTrainer | TokenizedCPOTrainer],
    args: TuningArguments,
    training_args: ORPOConfig | CPOConfig,
    model_args: ModelConfig,
) -> None:
    """Do what the recipes do once their arguments are parsed."""
    tokenizer = prepare_for_trl(model_args, training_args)
    train_rows, eval_rows = load_both(load_rows, "preference", args, training_args, model_args, tokenizer)
    training_args.remove_unused_columns = False  # as these trainers demand
    loading, training_args.model_init_kwargs = training_args.model_init_kwargs, None  # for models that TRL loads
    with building("trainer"):
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            trust_remote_code=training_args.trust_remote_code,
            quantization_config=get_quantization_config(model_args),
            **loading,
        )
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=join_answers(train_rows, training_args.max_length),
            eval_dataset=join_answers(eval_rows, training_args.max_length) if eval_rows else None,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    training_args.model_init_kwargs = loading
    run_training(trainer, chat_prompts(args.sample_prompts), describe_run(recipe, args, model_args))


def join_answers(rows: Dataset, max_length: int | None) -> Dataset:
    """Return the question with each answer in the columns of TRL's experimental trainers; the answers carry loss."""
    return rows.map(_join_answers, fn_kwargs={"max_length": max_length}, remove_columns=rows.column_names)


def _join_answers(row: dict[str, Any], max_length: int | None) -> dict[str, list[int]]:
    columns = {}
    for key in ("chosen", "rejected"):
        ids = (row["prompt_ids"] + row[f"{key}_ids"])[:max_length]
        columns[f"{key}_input_ids"] = ids
        columns[f"{key}_attention_mask"] = [1] * len(ids)
        columns[f"{key}_labels"] = ([IGNORED] * len(row["prompt_ids"]) + row[f"{key}_ids"])[:max_length]
    return columns
