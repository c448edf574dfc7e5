"""The arguments that the TRL recipes (sft/, rlhf/) share, and what follows from them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from buddygpt.cli.checkpoints import checkpoint_sha256
from buddygpt.cli.files import ROW_TYPES, file_sha256, find_files
from buddygpt.training.model_card import describe_base


@dataclass
class TuningArguments:
    train_files: list[str] = field(metadata={"help": "jsonl or parquet files of rows as described above, or globs."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Held-out rows of the same form."})
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Questions to answer at each evaluation."}
    )
    exams: list[str] = field(
        default_factory=list, metadata={"help": "Folders of benchmarks. A row that contains an item of one is bad."}
    )
    optimizer: str | None = field(
        default=None,
        metadata={"choices": ["muon"], "help": "muon: Muon for matrices, AdamW for the rest. Default: see `optim`."},
    )
    train_on_unfit_data: bool = field(
        default=False,
        metadata={"help": "Leave bad rows out, and train even if data/doctor.py calls the rows not fit."},
    )


def chat_prompts(questions: list[str]) -> list[list[dict[str, str]]]:
    """Return each question as a chat of one user turn."""
    return [[{"role": "user", "content": question}] for question in questions]


def load_both(
    load_rows: Callable[..., Dataset],
    kind: str,
    args: TuningArguments,
    training_args: SFTConfig | DPOConfig,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    **more_options: Any,
) -> tuple[Dataset, Dataset | None]:
    """Return the rows for training and for evaluation. Call it before the model is loaded: bad rows stop the run.

    Args:
        load_rows: That of data/chat/load.py.
        kind: Of the rows.
        more_options: Further keyword arguments of `load_rows`.
    """
    key = reference_key(training_args, model_args) if getattr(training_args, "precompute_ref_log_probs", False) else ()
    sets = []
    with training_args.main_process_first(desc="reading the rows"):  # the others read its cache
        for files in (args.train_files, args.eval_files):
            is_evaluation = files is args.eval_files
            if is_evaluation and not files:
                return sets[0], None
            options = row_options(args, training_args, tokenizer, is_evaluation)
            sets.append(load_rows(files, kind, key=key, **options, **more_options))
    return sets[0], sets[1]


def trainer_options(
    model_args: ModelConfig, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the keyword arguments that a TRL trainer takes for the model, which it loads by its name."""
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model_args),
        "quantization_config": get_quantization_config(model_args),
    }


def reference_key(training_args: DPOConfig, model_args: ModelConfig) -> list[Any]:
    """Return what determines the log-probabilities that a reference model gives to tokenized rows.

    TRL keeps them on disk by the rows and the weights alone: a run with another `max_length` would read wrong ones.
    """
    loading = sorted((training_args.model_init_kwargs or {}).items())
    precision = [training_args.bf16, training_args.fp16]
    length = [training_args.max_length, getattr(training_args, "truncation_mode", None)]
    return [checkpoint_sha256(model_args.model_name_or_path), str(loading), *precision, *length]


def row_options(
    args: TuningArguments, training_args: SFTConfig | DPOConfig, tokenizer: PreTrainedTokenizerBase, evaluation: bool
) -> dict[str, Any]:
    """Return the keyword arguments with which a recipe loads its rows for training or for evaluation."""
    packing = getattr(training_args, "packing", False)
    if evaluation and getattr(training_args, "eval_packing", None) is not None:
        packing = training_args.eval_packing
    # Packing keeps the start of a row, or all of it: then what is too long continues in the next sequence.
    continues = packing and training_args.packing_strategy != "bfd"
    return {
        "tokenizer": tokenizer,
        "max_length": None if continues else training_args.max_length,
        "keep_end": not packing and getattr(training_args, "truncation_mode", "keep_start") == "keep_end",
        "assistant_only": getattr(training_args, "assistant_only_loss", True),
        "benchmarks": args.exams,
        "force": args.train_on_unfit_data,
        "num_proc": training_args.dataset_num_proc,
        "advise": name_commands,
    }


def name_commands(
    files: list[str],
    kind: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    benchmarks: Sequence[str],
) -> str:
    """Return what to do about rows that are not fit: the commands that show, fix or leave out the bad ones."""
    stage = {"preference": "dpo"}.get(kind, kind)
    names = shlex.join(files)
    options = f" --tokenizer {shlex.quote(tokenizer.name_or_path)}" if tokenizer else ""
    if benchmarks:
        options += f" --exams {shlex.join(benchmarks)}"
    limit = f" --max_length {max_length}" if max_length else ""
    return (
        f"See: python data/doctor.py {names} --stage {stage}{options}{limit}. "
        f"Fix or convert the rows: python data/convert_chat.py --kind {kind} --input {names} --output NEW.jsonl"
        f"{options}; or train without the bad rows: --train_on_unfit_data true"
    )


def describe_run(recipe: str, args: TuningArguments, model_args: ModelConfig) -> dict[str, Any]:
    """Return what the recipe adds to `run.json`: its arguments, and the hashes of what it starts from."""
    origin = {
        "base_sha256": checkpoint_sha256(model_args.model_name_or_path),
        "optimizer": args.optimizer,
        "data_sha256": [file_sha256(path) for path in find_files(args.train_files, ROW_TYPES)],
        "eval_data_sha256": [file_sha256(path) for path in find_files(args.eval_files, ROW_TYPES)],
    }
    if model_args.use_peft:
        prefixes = ("lora_", "use_", "load_in_")
        origin |= {key: value for key, value in vars(model_args).items() if key.startswith(prefixes)}
    base = describe_base(model_args.model_name_or_path)
    return {"recipe": recipe, "arguments": vars(args), "origin": origin, **base}
