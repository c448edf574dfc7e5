"""Distillation: a small chat model learns the probabilities that a larger one, the teacher, gives to every token.

    CONFIG=sft/configs/quickstart-distill.yaml
    python tools/store_teacher.py --teacher DIR --train_files FILES --output outputs/quickstart/teacher
    accelerate launch --config_file accelerate_configs/cpu.yaml sft/distill.py --config $CONFIG

`--method offline` trains on instructions with the stored predictions of a teacher and takes every option of TRL's
`SFTConfig`. `--method on_policy` lets the student answer the prompts and the teacher judge each token of the answers
(arXiv:2306.13649); it takes every option of TRL's `DistillationConfig`, such as `--beta`. Both need a teacher with the
same vocabulary. An interrupted run resumes.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from trl import (
    DistillationConfig,
    DistillationTrainer,
    ModelConfig,
    SFTConfig,
)

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments, read_option
from buddygpt.cli.checkpoints import checkpoint_sha256, load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256
from buddygpt.cli.weights import require_finite_weights
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.prompt_batches import PromptsWithTools
from buddygpt.data.chat.prompts import load_prompts
from buddygpt.training.distillation import StoredTeacherTrainer, require_plain_head, require_same_vocabulary
from buddygpt.training.generation import room_for_prompts
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training
from buddygpt.training.starting_checkpoint import prepare_for_trl
from buddygpt.training.teacher_targets import StoredTargets, describe_rows, number_targets
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, row_options, trainer_options


@dataclass
class DistillArguments:
    method: Literal["offline", "on_policy"] = field(
        default="offline", metadata={"help": "offline: instructions and stored predictions; on_policy: own answers."}
    )
    teacher_targets: str | None = field(
        default=None, metadata={"help": "offline: the folder that tools/store_teacher.py has written."}
    )
    label_weight: float = field(
        default=0.0, metadata={"help": "offline: weight of the usual loss, from 0 to 1; the teacher has the rest."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"label_weight is {self.label_weight}; use a number from 0 to 1")


class OnPolicyTrainer(PromptsWithTools, DistillationTrainer):
    pass


CONFIGS = {"offline": SFTConfig, "on_policy": DistillationConfig}


def main() -> None:
    config_class = CONFIGS.get(str(read_option("method")), SFTConfig)
    args, distill_args, training_args, model_args = parse_arguments(
        *(TuningArguments, DistillArguments, config_class, ModelConfig),
        description=__doc__,
        defaults=recipe_defaults(),
    )
    tokenizer = prepare_for_trl(model_args, training_args)
    prepare = prepare_offline if config_class is SFTConfig else prepare_on_policy
    trainer_class, more, origin = prepare(args, distill_args, training_args, model_args, tokenizer)
    with building("trainer"):
        trainer = trainer_class(**trainer_options(model_args, training_args, tokenizer), **more)
    if config_class is DistillationConfig:
        require_finite_weights(trainer.teacher_model, training_args.teacher_model_name_or_path)
    run_card = describe_run("distill", args, model_args)
    run_card["arguments"] = vars(args) | vars(distill_args)
    run_card["origin"] |= origin
    run_training(trainer, chat_prompts(args.sample_prompts), run_card)


def prepare_offline(
    args: TuningArguments,
    distill_args: DistillArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """Return the trainer's class, its arguments and the origin for a run on stored predictions."""
    if distill_args.teacher_targets is None:
        raise UserError("give teacher_targets: the folder that tools/store_teacher.py has written")
    cut = {"truncation_mode": "keep_start", "packing_strategy": "bfd"}
    for key, value in cut.items():
        if getattr(training_args, key) != value:
            raise UserError(
                f"{key}: {getattr(training_args, key)} would cut rows in other places than the teacher read"
            )
    student = require_causal_lm(model_args.model_name_or_path, training_args.trust_remote_code)
    require_plain_head(student, model_args.model_name_or_path)
    targets = StoredTargets(Path(distill_args.teacher_targets))
    with training_args.main_process_first(desc="reading the rows"):  # the others read its cache
        options = row_options(args, training_args, tokenizer, evaluation=False)
        rows = load_rows(args.train_files, "sft", **options)
        targets.require_rows(describe_rows(args.train_files, rows, tokenizer, training_args.max_length))
        rows = number_targets(rows, training_args.max_length)
        options = row_options(args, training_args, tokenizer, evaluation=True)
        eval_rows = load_rows(args.eval_files, "sft", **options) if args.eval_files else None
    more = {"train_dataset": rows, "eval_dataset": eval_rows, "targets": targets}
    origin = {
        "teacher_targets_sha256": file_sha256(targets.folder / "manifest.json"),
        "label_weight": distill_args.label_weight,
    }
    return StoredTeacherTrainer, more | {"label_weight": distill_args.label_weight}, origin


def prepare_on_policy(
    args: TuningArguments,
    distill_args: DistillArguments,
    training_args: DistillationConfig,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """Return the trainer's class, its arguments and the origin for a run on the student's own answers."""
    if distill_args.teacher_targets is not None or distill_args.label_weight:
        raise UserError("teacher_targets and label_weight belong to method: offline; remove them, or use that")
    name = training_args.teacher_model_name_or_path
    if name is None:
        raise UserError("give teacher_model_name_or_path: the checkpoint of the teacher")
    teacher = require_causal_lm(name, training_args.trust_remote_code)
    require_same_vocabulary(load_tokenizer(name), tokenizer)
    student = require_causal_lm(model_args.model_name_or_path, training_args.trust_remote_code)
    sizes = [config.get_text_config().vocab_size for config in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name} has {sizes[0]:,} embeddings and the student {sizes[1]:,}: on_policy needs equally many. "
            "method: offline does not"
        )
    for key in ("aux_loss_alpha", "z_loss_coef"):
        if getattr(student, key, 0):
            print(f"warning: {key} of the model has no effect with method: on_policy", file=sys.stderr)
    training_args.teacher_model_init_kwargs = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.teacher_model_init_kwargs or {}),
    }
    room = room_for_prompts(model_args, training_args)
    limit = getattr(teacher, "max_position_embeddings", None)
    rooms = [each for each in (room, limit and limit - training_args.max_completion_length) if each is not None]
    options = {
        "tokenizer": tokenizer,
        "max_length": min(rooms) if rooms else None,
        "benchmarks": args.exams,
        "force": args.train_on_unfit_data,
    }
    rows = load_prompts(args.train_files, **options)
    batch = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    if len(rows) < batch:  # TRL's sampler would give no batch at all
        raise UserError(
            f"there are {len(rows)} rows, fewer than the {batch} questions of a step: add rows, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    eval_rows = load_prompts(args.eval_files, **options) if args.eval_files else None
    more = {"train_dataset": rows, "eval_dataset": eval_rows, "teacher_model": name}
    return OnPolicyTrainer, more, {"teacher_sha256": checkpoint_sha256(name)}


if __name__ == "__main__":
    run_recipe(main)
