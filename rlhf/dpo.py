"""Direct preference optimization (arXiv:2305.18290) of a chat model, all parameters or LoRA.

    accelerate launch --config_file accelerate_configs/cpu.yaml rlhf/dpo.py --config rlhf/configs/quickstart.yaml

Data: rows of `prompt`, `chosen`, `rejected` (make them with data/convert_chat.py). Every option of TRL's `DPOConfig`
(`--precompute_ref_log_probs true`, `--loss_type ...`) and `ModelConfig` (`--use_peft true ...`) works here, in the
YAML or as `--key value`. An interrupted run resumes.
"""

from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments
from buddygpt.data.chat.load import load_rows
from buddygpt.training.run import prepare_for_trl, recipe_defaults, run_recipe, run_training
from buddygpt.training.tuning import TuningArguments, chat_prompts, describe_run, row_checks


def main() -> None:
    args, training_args, model_args = parse_arguments(
        TuningArguments, DPOConfig, ModelConfig, description=__doc__, defaults=recipe_defaults()
    )
    tokenizer = prepare_for_trl(model_args, training_args)
    # Rows that are not fit stop the run here, before the model is loaded.
    checks = row_checks(args, training_args, tokenizer)
    # TRL computes the loss of both answers (trl/trainer/dpo_trainer.py), with a frozen copy as the reference model.
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(args.train_files, "preference", **checks),
        eval_dataset=load_rows(args.eval_files, "preference", **checks) if args.eval_files else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    run_training(trainer, chat_prompts(args.sample_prompts), describe_run("dpo", args, model_args))


if __name__ == "__main__":
    run_recipe(main)
