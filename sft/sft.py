"""Supervised fine-tuning on chat data: loss on the assistant's words of every turn, all parameters or LoRA.

    accelerate launch --config_file accelerate_configs/cpu.yaml sft/sft.py --config sft/configs/quickstart.yaml

Data: rows of `messages` (make them with data/convert_chat.py). Every option of TRL's `SFTConfig` and `ModelConfig`
(`--use_peft true --lora_r 16 ...`) is one here, in the YAML or as `--key value`. Runs resume by themselves.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import checkpoint_sha256
from buddygpt.cli.files import file_sha256, find_files
from buddygpt.data.chat.load import load_messages
from buddygpt.training.run import prepare_for_trl, run_recipe, run_training


@dataclass
class SFTArguments:
    train_files: list[str] = field(metadata={"help": "jsonl or parquet files of `messages` rows; globs allowed."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Held-out rows of the same form."})
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Questions to answer at each evaluation."}
    )
    exams: list[str] = field(
        default_factory=list, metadata={"help": "Folders of exams; a row that holds an item of theirs is a bad row."}
    )
    train_on_unfit_data: bool = field(
        default=False,
        metadata={"help": "Leave bad rows out, counted, and go on whatever else data/doctor.py finds unfit."},
    )


def main() -> None:
    args, training_args, model_args = parse_arguments(SFTArguments, SFTConfig, ModelConfig, description=__doc__)
    tokenizer = prepare_for_trl(model_args, training_args)
    verdict = {
        "tokenizer": tokenizer,
        "max_length": training_args.max_length,
        "assistant_only": training_args.assistant_only_loss,
        "exams": tuple(args.exams),
        "force": args.train_on_unfit_data,
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_messages(args.train_files, **verdict),
        eval_dataset=load_messages(args.eval_files, **verdict) if args.eval_files else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    prompts = [[{"role": "user", "content": prompt}] for prompt in args.sample_prompts]
    data_sha256 = [file_sha256(path) for path in find_files(args.train_files)]
    origin = {"base_sha256": checkpoint_sha256(model_args.model_name_or_path), "data_sha256": data_sha256}
    run_training(trainer, prompts, {"recipe": "sft", "arguments": vars(args), "origin": origin})


if __name__ == "__main__":
    run_recipe(main)
