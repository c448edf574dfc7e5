"""The part all recipes share once their `Trainer` stands: resume, train, evaluate, save, leave a run card."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.monitor import CurveCallback, ExpertLoadCallback, SampleCallback, find_routers, write_run_card

from .arguments import UserError
from .checkpoints import last_checkpoint, load_tokenizer, require_causal_lm


def prepare_for_trl(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> PreTrainedTokenizerBase:
    """Check the checkpoint a TRL trainer is about to load, hand its loading options over, return its tokenizer.

    TRL loads the model itself, by name, so that ZeRO-3 can shard it while loading.

    Raises:
        UserError: No checkpoint is named, it is not a causal language model, or its tokenizer has no chat template.
    """
    if model_args.model_name_or_path is None:
        raise UserError("give model_name_or_path: the checkpoint to start from")
    require_causal_lm(model_args.model_name_or_path, training_args.trust_remote_code)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    if tokenizer.chat_template is None:
        raise UserError(f"{model_args.model_name_or_path} has no chat template: put a chat_template.jinja into it")
    if model_args.use_peft and model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"  # peft knows other defaults for stock architectures only
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return tokenizer


def run_training(
    trainer: Trainer, prompts: list[Any], run_card: dict[str, Any], bias_update_speed: float = 0.0
) -> None:
    """Train to the end, from where an earlier call was stopped, and leave a folder the next stage takes.

    `output_dir` receives the weights, config, model code, tokenizer and template, generation config, `loss_curve.png`,
    `samples.md`, `run.json` and, of a mixture of experts, `expert_load.png`. A LoRA run leaves the adapter in
    `output_dir/adapter` and the merged model in `output_dir`.

    Args:
        trainer: Ready to train. `args.resume_from_checkpoint` names a checkpoint; by default the newest complete one
            in `args.output_dir` is taken.
        prompts: What to sample from at each evaluation: strings, or lists of chat messages.
        run_card: What the recipe adds to `run.json`: its own arguments, and as `origin` the hashes of what it starts
            from. A run is not resumed from another origin.
        bias_update_speed: See [`ExpertLoadCallback`].

    Raises:
        UserError: `output_dir` holds a checkpoint of another model or of a run with another origin.
    """
    args = trainer.args
    trainer.add_callback(SampleCallback(trainer, prompts))
    trainer.add_callback(CurveCallback())
    if find_routers(trainer.model):  # first, so that what it adds to the logs reaches the trackers
        trainer.callback_handler.callbacks.insert(0, ExpertLoadCallback(trainer, bias_update_speed))
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir, trainer.model.config)
    if checkpoint:
        _require_same_origin(Path(args.output_dir), run_card["origin"])
        trainer.accelerator.print(f"Resuming from {checkpoint}{_changes(Path(checkpoint), trainer)}")
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        write_run_card(trainer, run_card)
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluation = _final_evaluation(trainer) if trainer.eval_dataset is not None else {}
    _save(trainer)
    if trainer.is_world_process_zero():
        write_run_card(trainer, {**run_card, "metrics": {**_last_logged(trainer, "loss"), **evaluation}})
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    trainer.end()


def _require_same_origin(output_dir: Path, origin: dict[str, Any]) -> None:
    if not (output_dir / "run.json").exists():
        return
    before = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["origin"]
    for key, now in origin.items():
        if before.get(key) != now:
            raise UserError(
                f"cannot resume the run in {output_dir}: its {key} was {before.get(key)}, this run's is {now}. "
                "Give another --output_dir, or delete that one"
            )


def _changes(checkpoint: Path, trainer: Trainer) -> str:
    """What is to be done otherwise than when the checkpoint was made, in words."""
    if not (checkpoint / "training_args.bin").exists():
        return ""
    before = torch.load(checkpoint / "training_args.bin", weights_only=False).to_dict()
    now = trainer.args.to_dict()
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" with {', '.join(changed)}" if changed else ""


def _final_evaluation(trainer: Trainer) -> dict[str, float]:
    """The evaluation of the last step, if training ended with one; else a new one."""
    last = _last_logged(trainer, "eval_loss")
    return last if last.get("step") == trainer.state.global_step else trainer.evaluate()


def _last_logged(trainer: Trainer, key: str) -> dict[str, float]:
    return next((row for row in reversed(trainer.state.log_history) if key in row), {})


def _save(trainer: Trainer) -> None:
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        trainer.save_model(str(output_dir))
        return
    trainer.save_model(str(output_dir / "adapter"))
    if trainer.is_world_process_zero():
        merged = model.merge_and_unload()
        merged.save_pretrained(output_dir)
        trainer.processing_class.save_pretrained(output_dir)
