"""The steps that all recipes share once their `Trainer` exists: resume, train, evaluate, save, write the run card."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.integrations import SwanLabCallback

from buddygpt.cli.errors import UserError, library_errors, run_script
from buddygpt.cli.weights import require_finite_weights
from buddygpt.training.adapters import start_lora
from buddygpt.training.callbacks.alarms import AlarmCallback
from buddygpt.training.callbacks.curve import CurveCallback
from buddygpt.training.callbacks.experts import ExpertLoadCallback, find_routers
from buddygpt.training.callbacks.progress import show_progress_lines
from buddygpt.training.callbacks.samples import SampleCallback
from buddygpt.training.callbacks.throughput import ThroughputCallback
from buddygpt.training.evaluation import average_over_tokens
from buddygpt.training.extensions import claim_extensions
from buddygpt.training.hardware import HardwareCallback, require_strategy
from buddygpt.training.model_losses import add_model_losses
from buddygpt.training.optimizers import use_optimizer
from buddygpt.training.origin import (
    describe_changed_arguments,
    describe_settings,
    describe_state,
    require_no_other_model,
    require_same_origin,
)
from buddygpt.training.pickles import load_without_code, reporting_damage
from buddygpt.training.resume import (
    ResumedStateCallback,
    Start,
    expect_tied_weights_once,
    find_start,
    require_training_state,
)
from buddygpt.training.run_card import write_run_card
from buddygpt.training.saving import claim_folder, save_checkpoints_atomically, save_final_model


def run_recipe(main: Callable[[], None]) -> None:
    """Call the `main` of a recipe through [`run_script`]."""
    if "LOCAL_RANK" in os.environ:  # DeepSpeed may compile extensions as soon as the arguments are parsed
        claim_extensions()
    run_script(main)


def recipe_defaults() -> dict[str, Any]:
    """Return the defaults of our recipes that differ from those of `TrainingArguments`."""
    # Show NaN in the logs; the filter would hide it, and wait for the device at every step to do so.
    defaults: dict[str, Any] = {"logging_nan_inf_filter": False}
    if find_spec("trackio"):  # a tracker that stores everything on this machine: `trackio show`
        defaults |= {"report_to": "trackio", "project": "buddygpt"}
    return defaults


def building(part: str) -> AbstractContextManager[None]:
    """Turn what libraries refuse while they build the model, the trainer or its trackers into a UserError."""
    remedy = "Change the option that this is about, or install the package that it needs"
    return library_errors(f"cannot build the {part}", remedy)


def run_training(
    trainer: Trainer,
    prompts: list[Any],
    run_card: dict[str, Any],
    bias_update_speed: float = 0.0,
    describe_step: Callable[[int], str] | None = None,
    start: Start | None = None,
) -> None:
    """Train to the end, resuming if the run was stopped before, and leave a folder that the next stage can load.

    `output_dir` receives the weights, config, model code, tokenizer and template, generation config, `loss_curve.png`,
    `samples.md`, `run.json` and, for a mixture of experts, `expert_load.png`. A LoRA run saves the adapter in
    `output_dir/adapter` and the merged model in `output_dir`.

    Args:
        trainer: The trainer, not yet started.
        prompts: Sampled from at each evaluation: strings, or lists of chat messages.
        run_card: Entries that the recipe adds to `run.json`: its own `arguments`, whose `optimizer` is used (see
            [`use_optimizer`]), and as `origin` the hashes of its inputs. A run with another origin is not resumed.
        bias_update_speed: See [`ExpertLoadCallback`].
        describe_step: Returns a description of the data that a step reads, for warnings.
        start: Where to start, if the recipe has already called [`find_start`].

    Raises:
        UserError: As [`find_start`], [`require_strategy`], [`require_training_state`] and [`add_model_losses`];
            `output_dir` holds another model or a run of another origin; or another process is training there.
    """
    args = trainer.args
    require_strategy(trainer)
    require_finite_weights(trainer.model, trainer.model.config._name_or_path)
    use_optimizer(trainer, run_card["arguments"].get("optimizer"))
    if isinstance(trainer.model, PeftModel):
        start_lora(trainer)
    _add_callbacks(trainer, prompts, run_card, bias_update_speed, describe_step)
    average_over_tokens(trainer)
    if run_card["recipe"] != "pretrain":
        _sample_in_chats(getattr(trainer.model, "generation_config", None))  # a reward model has none
    add_model_losses(trainer)

    # Resume only from a run with the same inputs.
    start = start or find_start(args, trainer.model)
    run_card["origin"] |= describe_state(trainer)
    run_card["origin"]["settings"] = describe_settings(trainer, run_card["arguments"])
    require_no_other_model(Path(args.output_dir), start.checkpoint)
    if start.checkpoint:
        require_same_origin(start, run_card["origin"])
        require_training_state(Path(start.checkpoint), trainer)
        changes = describe_changed_arguments(start, trainer)
        trainer.accelerator.print(f"Resuming from {start.checkpoint}{changes}")

    lock = claim_folder(args.output_dir) if args.should_save else None
    save_checkpoints_atomically(trainer)
    trainer.add_callback(ResumedStateCallback(trainer, start.checkpoint))
    if start.step >= args.max_steps > 0:
        # The run is finished, but `Trainer` would take one more step if the epoch has more data: give it no batch.
        trainer.get_batch_samples = lambda *_: ([], None)
    expect_tied_weights_once(trainer)
    load_without_code(trainer)
    _train(trainer, start.checkpoint)
    step = _step_of_weights(trainer)
    evaluation = _evaluation_at(trainer, step) if trainer.eval_dataset is not None else {}

    save_final_model(trainer)
    if trainer.is_world_process_zero():
        metrics = {**_last_logged(trainer, "loss", step), **evaluation}
        write_run_card(trainer, {**run_card, "weights_of_step": step, "metrics": metrics})
    if lock:
        Path(lock.name).unlink()
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    trainer.end()


def _add_callbacks(
    trainer: Trainer,
    prompts: list[Any],
    run_card: dict[str, Any],
    bias_update_speed: float,
    describe_step: Callable[[int], str] | None,
) -> None:
    # Copy batches while the device computes. Otherwise fetching a batch waits for the device, and that time would be
    # reported as waiting for data.
    trainer.accelerator.dataloader_config.non_blocking = trainer.args.dataloader_pin_memory

    # These run before the trainer's own callbacks. Expert load and throughput add to the logs: alarms and trackers
    # read what they add. The hardware summary is printed above the progress bar.
    first: list[TrainerCallback] = []
    expert_load = None
    if find_routers(trainer.model):
        expert_load = ExpertLoadCallback(trainer, bias_update_speed)
        first.append(expert_load)
    first.append(ThroughputCallback(trainer, run_card))
    first.append(AlarmCallback(trainer, run_card, expert_load, describe_step))
    first.append(HardwareCallback(trainer, run_card))
    trainer.callback_handler.callbacks[:0] = first

    trainer.add_callback(SampleCallback(trainer, prompts))
    trainer.add_callback(CurveCallback())
    show_progress_lines(trainer)
    _let_swanlab_begin(trainer)
    trainer.args.run_name = trainer.args.run_name or trainer.args.output_dir  # a tracker continues a resumed run


def _let_swanlab_begin(trainer: Trainer) -> None:
    """Let transformers ask swanlab 0.10 whether there is a run: `get_run` raises if there is none, instead of None."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SwanLabCallback):
            swanlab, get_run = callback._swanlab, callback._swanlab.get_run
            swanlab.get_run = lambda has=swanlab.has_run, get=get_run: get() if has() else None


class BeginCallback(TrainerCallback):
    """Knows whether optimizer, schedule and trackers are built, so that the first batch is next."""

    is_over = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.is_over = True


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    beginning = BeginCallback()
    trainer.add_callback(beginning)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UnpicklingError as error:  # DeepSpeed loads while it builds its engine
        with reporting_damage(checkpoint):
            raise error
    except Exception as error:
        is_unknown_metric = "metric_for_best_model" in str(error)  # known only after the first evaluation
        if beginning.is_over and not is_unknown_metric:
            raise
        (Path(trainer.args.output_dir) / "run.lock").unlink(missing_ok=True)
        if is_unknown_metric:
            raise UserError(str(error)) from error
        with building("optimizer, the schedule or a tracker"):
            raise error


def _sample_in_chats(generation_config: GenerationConfig | None) -> None:
    """Let servers sample: without `do_sample` they ignore the temperature that a client asks for."""
    if generation_config is not None and generation_config.do_sample is None:
        generation_config.do_sample = True
        generation_config.temperature = generation_config.temperature or 0.7


def _step_of_weights(trainer: Trainer) -> int:
    """Return the step of the model in memory: the best one if `load_best_model_at_end` has loaded it, or the last."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None:
        return int(Path(best).name.rsplit("-", 1)[1])
    return trainer.state.global_step


def _evaluation_at(trainer: Trainer, step: int) -> dict[str, float]:
    """Return the metrics of the evaluation at the step of the weights; evaluate now if there was none."""
    metrics = {}
    for row in trainer.state.log_history:
        if row["step"] == step:
            metrics |= {key: value for key, value in row.items() if key.startswith("eval_")}
    return metrics or trainer.evaluate()


def _last_logged(trainer: Trainer, key: str, step: int) -> dict[str, float]:
    """Return the last row of the log up to `step` that has `key`."""
    for row in reversed(trainer.state.log_history):
        if key in row and row["step"] <= step:
            return row
    return {}
