"""The steps that all recipes share once their `Trainer` exists: resume, train, evaluate, save, write the run card."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations import SwanLabCallback
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.cli.checkpoints import end_of_answer_token, load_tokenizer, require_causal_lm, tokenizer_rules
from buddygpt.cli.errors import UserError, library_errors, run_script
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.training.adapters import prepare_lora, save_merged, start_lora, zero3_off
from buddygpt.training.callbacks.alarms import AlarmCallback
from buddygpt.training.callbacks.curve import CurveCallback
from buddygpt.training.callbacks.experts import ExpertLoadCallback, find_routers
from buddygpt.training.callbacks.progress import show_progress_lines
from buddygpt.training.callbacks.samples import SampleCallback
from buddygpt.training.callbacks.throughput import ThroughputCallback
from buddygpt.training.evaluation import average_over_tokens
from buddygpt.training.extensions import claim_extensions
from buddygpt.training.hardware import HardwareCallback, require_hardware, require_strategy
from buddygpt.training.liger import register_liger
from buddygpt.training.limits import require_limits
from buddygpt.training.model_losses import add_model_losses
from buddygpt.training.optimizers import use_optimizer
from buddygpt.training.pickles import load_without_code, reporting_damage
from buddygpt.training.positions import extend_positions, parse_model_kwargs
from buddygpt.training.resume import (
    CHECKSUMS,
    ResumedStateCallback,
    Start,
    claim_folder,
    expect_tied_weights_once,
    find_start,
    require_training_state,
    save_checkpoints_atomically,
    save_final_folder,
)
from buddygpt.training.run_card import portable, write_run_card


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


def prepare_for_trl(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> PreTrainedTokenizerBase:
    """Check the checkpoint that a TRL trainer will load, pass the loading options on, and return the tokenizer.

    TRL loads the model itself, by name, so that ZeRO-3 can shard it while loading.

    Raises:
        UserError: No checkpoint is named, it is not a causal language model, its tokenizer has no chat template, rows
            may be longer than it supports, the hardware is not as requested (see [`require_hardware`]), or LoRA cannot
            be used as requested (see [`prepare_lora`]).
    """
    if model_args.model_name_or_path is None:
        raise UserError("give model_name_or_path: the checkpoint to start from")
    require_limits(training_args, model_args)
    require_hardware(training_args, model_args.attn_implementation)
    register_liger(training_args)

    # Mistakes in the checkpoint should stop the run before the data is read.
    config = require_causal_lm(model_args.model_name_or_path, training_args.trust_remote_code)
    changes = extend_positions(config, parse_model_kwargs(training_args.model_init_kwargs))
    limit = changes.get("max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    if hasattr(training_args, "max_length"):  # rlhf/grpo.py limits prompts and answers
        require_positions("max_length", training_args.max_length, limit)
    if Path(model_args.model_name_or_path).is_dir():
        with zero3_off(training_args):
            require_all_weights(model_args.model_name_or_path, training_args.trust_remote_code)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    if path := getattr(training_args, "chat_template_path", None):
        tokenizer.chat_template = _read_template(Path(path))  # rows are tokenized before TRL sets it
    if tokenizer.chat_template is None:
        raise UserError(f"{model_args.model_name_or_path} has no chat template: add a chat_template.jinja to it")
    stop_at_end_of_answer(tokenizer)
    _require_embeddings(tokenizer, config)

    prepare_lora(model_args, config, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **changes,
    }
    if isinstance(training_args, SFTConfig):
        if training_args.eval_packing and not training_args.packing:
            raise UserError("eval_packing: true needs packing: true, else rows would see each other. Remove it")
        if training_args.eval_packing is None and training_args.packing_strategy != "bfd":
            training_args.eval_packing = False  # "wrapped" and "bfd_split" cut rows elsewhere, which changes eval_loss
    return tokenizer


def stop_at_end_of_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token that ends an answer in the chat template the eos token; the base model may have another one.

    `Trainer` then adds it to the model's config and generation config, so that answers stop in every engine.
    """
    end = end_of_answer_token(tokenizer)
    if tokenizer.eos_token != end:
        print(f"Answers end with {end}: it becomes the eos_token, which was {tokenizer.eos_token}")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.eos_token = end


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise UserError if the model has no embedding for the token that ends answers or the one that fills batches."""
    size = config.get_text_config().vocab_size
    for token in (tokenizer.eos_token, tokenizer.pad_token):
        number = tokenizer.convert_tokens_to_ids(token) if token else 0
        if number >= size:
            raise UserError(
                f"{tokenizer.name_or_path}: {token} has the id {number}, but the model has only {size} embeddings. "
                "Call model.resize_token_embeddings(len(tokenizer)) and save the model, or use another token"
            )


def require_positions(key: str, length: int | None, limit: int | None) -> None:
    """Raise UserError if rows may have more tokens than the model has positions; warn if they have no limit.

    Args:
        key: The name of the option that limits rows, for the message.
        length: Its value.
        limit: The model's `max_position_embeddings`; None if it has none.
    """
    if limit is None:
        return
    if length is None:
        print(f"warning: {key} is null: rows may be longer than the {limit} positions of the model", file=sys.stderr)
    elif length > limit:
        raise UserError(
            f"{key} is {length}, but the model has only {limit} positions (max_position_embeddings). Use at most "
            f"{limit}; or extend a checkpoint with model_init_kwargs: {{max_position_embeddings: {length}, "
            "rope_parameters: {rope_type: yarn}}, and a new model in the JSON of its config"
        )


def _read_template(path: Path) -> str:
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise UserError(f"chat_template_path: {path} is not a .jinja file; put the template of another model into one")
    return path.read_text(encoding="utf-8")


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
    run_card["origin"] |= _describe_state(trainer)
    _require_no_other_model(Path(args.output_dir), start.checkpoint)
    if start.checkpoint:
        _require_same_origin(start, run_card["origin"])
        require_training_state(Path(start.checkpoint), trainer)
        changes = _describe_changed_arguments(start, trainer)
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

    _save_final_model(trainer)
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


def _require_no_other_model(output_dir: Path, checkpoint: str | None) -> None:
    """Raise UserError if the folder holds a model, tokenizer or checkpoint that is not of the run being resumed."""
    if checkpoint and Path(checkpoint).parent.resolve() == output_dir.resolve():
        return
    for pattern in ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors"):
        for file in output_dir.glob(pattern):
            raise UserError(
                f"{output_dir} holds a finished model or tokenizer ({file.name}) and no checkpoint to resume from: "
                "this run would overwrite it. Set another output_dir, or delete that one"
            )
    for folder in output_dir.glob("checkpoint-*"):
        if not (folder / CHECKSUMS).exists():
            raise UserError(
                f"{folder} is not a checkpoint of these recipes (it has no {CHECKSUMS}), and this run might delete "
                "it. Set another output_dir, or delete that one"
            )


def _describe_state(trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same for the state of a run to fit: the batch, the optimizer and the tokenizer."""
    tokenizer = trainer.processing_class
    rules = [tokenizer_rules(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template]
    changes = getattr(trainer.args, "model_init_kwargs", None) or {}
    return {
        "rope_parameters": changes.get("rope_parameters"),
        "global_batch": trainer.get_total_train_batch_size(trainer.args),
        "optim": str(trainer.args.optim.value).removesuffix("_fused"),
        "tokenizer_sha256": sha256(json.dumps(rules).encode()).hexdigest(),
    }


def _require_same_origin(start: Start, origin: dict[str, Any]) -> None:
    folder = Path(start.checkpoint).parent
    before = start.card.get("origin", origin)
    for key, now in origin.items():
        if before.get(key) == now:
            continue
        if key == "global_batch":
            product = "per_device_train_batch_size x gradient_accumulation_steps x processes"
            remedy = f"Choose {product} = {before.get(key)}, or set another output_dir"
        else:
            remedy = "Set another output_dir, or delete that one"
        raise UserError(
            f"cannot resume the run in {folder}: its {key} was {before.get(key)}, this run's is {now}. {remedy}"
        )


def _describe_changed_arguments(start: Start, trainer: Trainer) -> str:
    """Return the training arguments that differ from those in the run card: " with key old -> new, ..."."""
    before = start.card.get("training_arguments", {})
    now = portable(json.loads(json.dumps(trainer.args.to_dict(), default=str)), Path(trainer.args.output_dir))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" with {', '.join(changed)}" if changed else ""


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


def _save_final_model(trainer: Trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    with save_final_folder(trainer) as folder:
        if not isinstance(model, PeftModel):
            trainer.save_model(str(folder))
            return
        trainer.save_model(str(folder / "adapter"))
        if trainer.is_world_process_zero():
            save_merged(trainer, folder / "adapter", folder)
            trainer.processing_class.save_pretrained(folder)
