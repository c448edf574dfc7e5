"""The part all recipes share once their `Trainer` stands: resume, train, evaluate, save, leave a run card."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.cli.checkpoints import load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.training.callbacks.alarms import AlarmCallback
from buddygpt.training.callbacks.curve import CurveCallback
from buddygpt.training.callbacks.experts import ExpertLoadCallback, find_routers
from buddygpt.training.callbacks.progress import show_progress_lines
from buddygpt.training.callbacks.samples import SampleCallback
from buddygpt.training.callbacks.throughput import ThroughputCallback
from buddygpt.training.extensions import claim_extensions
from buddygpt.training.hardware import HardwareCallback, require_hardware, require_strategy
from buddygpt.training.liger import register_liger
from buddygpt.training.resume import Start, claim_folder, find_start, write_checkpoints_beside, written_beside
from buddygpt.training.run_card import write_run_card


def run_recipe(main: Callable[[], None]) -> None:
    """[`run_script`] for a recipe. DeepSpeed may compile extensions as soon as the arguments are parsed."""
    if "LOCAL_RANK" in os.environ:
        claim_extensions()
    run_script(main)


def prepare_for_trl(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> PreTrainedTokenizerBase:
    """Check the checkpoint a TRL trainer is about to load, hand its loading options over, return its tokenizer.

    TRL loads the model itself, by name, so that ZeRO-3 can shard it while loading.

    Raises:
        UserError: No checkpoint is named, it is not a causal language model, or its tokenizer has no chat template.
    """
    if model_args.model_name_or_path is None:
        raise UserError("give model_name_or_path: the checkpoint to start from")
    require_hardware(training_args, model_args.attn_implementation)
    register_liger(training_args)
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
    trainer: Trainer,
    prompts: list[Any],
    run_card: dict[str, Any],
    bias_update_speed: float = 0.0,
    describe_step: Callable[[int], str] | None = None,
    start: Start | None = None,
) -> None:
    """Train to the end, from where an earlier call was stopped, and leave a folder the next stage takes.

    `output_dir` receives the weights, config, model code, tokenizer and template, generation config, `loss_curve.png`,
    `samples.md`, `run.json` and, of a mixture of experts, `expert_load.png`. A LoRA run leaves the adapter in
    `output_dir/adapter` and the merged model in `output_dir`.

    Args:
        trainer: Ready to train.
        prompts: What to sample from at each evaluation: strings, or lists of chat messages.
        run_card: What the recipe adds to `run.json`: its own arguments, and as `origin` the hashes of what it starts
            from. A run is not resumed from another origin.
        bias_update_speed: See [`ExpertLoadCallback`].
        describe_step: A step -> what it read, in words, for warnings.
        start: Where to begin, if the recipe had to know it before; see [`find_start`].

    Raises:
        UserError: As [`find_start`], or the run there had another origin.
    """
    args = trainer.args
    require_strategy(trainer)
    trainer.callback_handler.callbacks.insert(0, HardwareCallback(trainer, run_card))  # before the progress bar
    _watch(trainer, prompts, run_card, bias_update_speed, describe_step)
    start = start or find_start(args, trainer.model.config)
    run_card["origin"]["global_batch"] = trainer.get_total_train_batch_size(args)
    if start.checkpoint:
        _require_same_origin(start, run_card["origin"])
        trainer.accelerator.print(f"Resuming from {start.checkpoint}{_changes(Path(start.checkpoint), trainer)}")
    lock = claim_folder(args.output_dir) if args.should_save else None
    write_checkpoints_beside(trainer)
    if start.step >= args.max_steps > 0:  # done already: `Trainer` would take one more step wherever an epoch has one
        trainer.get_batch_samples = lambda *_: ([], None)
    trainer.train(resume_from_checkpoint=start.checkpoint)
    evaluation = _final_evaluation(trainer) if trainer.eval_dataset is not None else {}
    _save(trainer)
    if trainer.is_world_process_zero():
        write_run_card(trainer, {**run_card, "metrics": {**_last_logged(trainer, "loss"), **evaluation}})
    if lock:
        Path(lock.name).unlink()
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    trainer.end()


def _watch(
    trainer: Trainer,
    prompts: list[Any],
    run_card: dict[str, Any],
    bias_update_speed: float,
    describe_step: Callable[[int], str] | None,
) -> None:
    """Add what is shown of a run; first what adds to the logs, so that it reaches the trackers and the alarms."""
    # Batches are copied while the device works; else fetching one waits for it, which would count as waiting for data.
    trainer.accelerator.dataloader_config.non_blocking = trainer.args.dataloader_pin_memory
    load = ExpertLoadCallback(trainer, bias_update_speed) if find_routers(trainer.model) else None
    alarms = AlarmCallback(trainer, run_card, load, describe_step)
    trainer.callback_handler.callbacks[:0] = [*filter(None, [load]), ThroughputCallback(trainer, run_card), alarms]
    trainer.add_callback(SampleCallback(trainer, prompts))
    trainer.add_callback(CurveCallback())
    show_progress_lines(trainer)
    trainer.args.run_name = trainer.args.run_name or trainer.args.output_dir  # a tracker goes on with a resumed run


def _require_same_origin(start: Start, origin: dict[str, Any]) -> None:
    before, folder = start.card.get("origin", origin), Path(start.checkpoint).parent
    for key, now in origin.items():
        if before.get(key) == now:
            continue
        remedy = "Give another --output_dir, or delete that one"
        if key == "global_batch":
            product = "per_device_train_batch_size x gradient_accumulation_steps x processes"
            remedy = f"Choose {product} = {before.get(key)}, or give another --output_dir"
        raise UserError(
            f"cannot resume the run in {folder}: its {key} was {before.get(key)}, this run's is {now}. {remedy}"
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
    last = [row for row in trainer.state.log_history if row["step"] == trainer.state.global_step]
    metrics = {key: value for row in last for key, value in row.items() if key.startswith("eval_")}
    return metrics or trainer.evaluate()


def _last_logged(trainer: Trainer, key: str) -> dict[str, float]:
    return next((row for row in reversed(trainer.state.log_history) if key in row), {})


def _save(trainer: Trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    with written_beside(trainer) as folder:
        if not isinstance(model, PeftModel):
            trainer.save_model(str(folder))
            return
        trainer.save_model(str(folder / "adapter"))
        if trainer.is_world_process_zero():
            merged = model.merge_and_unload()
            merged.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
