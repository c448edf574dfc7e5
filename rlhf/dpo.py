"""Direct preference optimization (arXiv:2305.18290) of a chat model, all parameters or LoRA.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/dpo.py --config rlhf/configs/quickstart.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `DPOConfig`
(`--precompute_ref_log_probs true`, `--loss_type ...`) and `ModelConfig` (`--use_peft true ...`) works here, in the
YAML or as `--key value`. An interrupted run resumes.
"""

from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, ModelConfig

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.data.chat.load import load_rows
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


class TokenizedDPOTrainer(DPOTrainer):
    """Takes rows that are tokenized already, whose answers end with their end mark (see data/chat/tokens.py).

    The loss `sft` is that of arXiv:2404.19733 (equation 2): the mean over pairs, and of each chosen answer the mean
    over its tokens. TRL's is the mean over the tokens of a micro-batch, so it depends on how pairs are batched.
    """

    def _prepare_dataset(self, dataset: Dataset, *_) -> Dataset:
        return dataset

    def _compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "sft" not in self.loss_types:
            return super()._compute_loss(model, inputs, return_outputs)
        seen: list[torch.Tensor] = []  # log-probabilities of the tokens, of each call of the model

        def model_that_keeps(**options: Any) -> Any:
            outputs = model(**options)
            seen.append(getattr(outputs, "log_probs", None))
            return outputs

        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        others = [term for term in terms if term[0] != "sft"]
        self.loss_types, self.loss_weights = [name for name, _ in others], [weight for _, weight in others]
        try:
            result = super()._compute_loss(model_that_keeps, inputs, return_outputs)
        finally:
            self.loss_types, self.loss_weights = map(list, zip(*terms, strict=True))
        mask = inputs["completion_mask"][:, 1:].chunk(2)[0]
        log_probs = seen[0][:, -mask.size(1) :].chunk(2)[0]
        means = -(log_probs * mask).sum(1) / mask.sum(1).clamp(min=1)
        loss = means.mean() * sum(weight for name, weight in terms if name == "sft")
        return (result[0] + loss, result[1]) if return_outputs else result + loss


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


def require_losses_that_go_together(args: DPOConfig) -> None:
    """Raise UserError for losses that TRL computes in another way than their names say, without a word."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    if args.use_weighting and "sft" in names:
        raise UserError("use_weighting weighs pairs, and loss_type sft has no pairs; remove one of them")
    sorting = [name for name in names if name.startswith("aot")]
    if sorting and args.per_device_train_batch_size == 1:
        raise UserError(
            f"loss_type {sorting[0]} sorts the pairs of a batch: per_device_train_batch_size must be at least 2"
        )


if __name__ == "__main__":
    run_recipe(main)
