"""Whether a run may go on in its folder: what must be the same as before, and what belongs to somebody else."""

import json
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from buddygpt.cli.checkpoints import tokenizer_rules
from buddygpt.cli.errors import UserError
from buddygpt.training.resume import Start
from buddygpt.training.run_card import portable
from buddygpt.training.saving import CHECKSUMS

# Options of TRL's configs and of our recipes that a resumed run may change. All others decide what is trained and must
# stay the same, also those that a later TRL adds. Of the options of `TrainingArguments`, it is the other way round:
# schedule, strategies, precision and hardware may change, those in FIXED may not.
FREE = {
    *("activation_offloading", "cache_implementation", "dataset_num_proc", "ds3_gather_for_generation"),
    *("precompute_ref_batch_size", "precompute_ref_log_probs", "steps_per_generation", "trust_remote_code"),
    *("pad_to_multiple_of", "padding_free", "padding_value", "use_vllm", "attn_implementation", "verify_data"),
    *("transformers_continuous_batching_config", "use_transformers_continuous_batching", "use_transformers_paged"),
    # evaluation and output
    *("eval_packing", "generate_during_eval", "num_generations_eval", "num_completions_to_print", "sample_prompts"),
    *("log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts", "replay_step"),
    # what `origin` holds by its content, or the checkpoint by its shapes
    *("train_files", "eval_files", "train_data", "eval_data", "optimizer", "tokenizer", "chat_template_path"),
    *("eos_token", "pad_token", "model_config", "model_name_or_path", "vocab_size", "model_init_kwargs"),
}
FIXED = ("dataloader_drop_last", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy")
LATER = ("settings", "eval_data_sha256")  # runs of earlier versions do not have these


def require_no_other_model(output_dir: Path, checkpoint: str | None) -> None:
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


def describe_state(trainer: Trainer) -> dict[str, Any]:
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


def describe_settings(trainer: Trainer, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options that decide what a run trains: the loss, and which tokens of which rows carry it.

    Args:
        trainer: Its arguments are those of the run.
        arguments: The recipe's own.
    """
    args = trainer.args
    names = {option.name for option in fields(args)} - {option.name for option in fields(TrainingArguments)}
    values = {name: getattr(args, name) for name in [*names, *FIXED]} | arguments
    values = {name: value for name, value in values.items() if name not in FREE}
    loading = getattr(args, "model_init_kwargs", None) or {}
    values |= {key: value for key, value in loading.items() if key not in FREE}
    if "train_files" in arguments:  # the blocks of pretraining have an order of their own
        values["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    return {
        name: _comparable(value)
        for name, value in sorted(values.items())
        if not name.startswith("vllm_") or name.startswith("vllm_importance")
    }


def _comparable(value: Any) -> Any:
    """Return a value as it is read back from `run.json`; of a file or folder only its name, for it may be moved."""
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if isinstance(value, str) and "/" in value and Path(value).exists():
        return Path(value).name
    return json.loads(json.dumps(value, default=str))


def require_same_origin(start: Start, origin: dict[str, Any]) -> None:
    """Raise UserError if the run to resume had other data, another base, optimizer, batch or loss."""
    folder = Path(start.checkpoint).parent
    before = start.card.get("origin", origin)
    settings, old = origin.get("settings", {}), before.get("settings", {})
    pairs = [(key, before.get(key), now) for key, now in origin.items() if key in before or key not in LATER]
    pairs = [pair for pair in pairs if pair[0] != "settings"]
    pairs += [(key, old[key], now) for key, now in settings.items() if key in old]
    for key, then, now in pairs:
        if then == now:
            continue
        if key == "global_batch":
            product = "per_device_train_batch_size x gradient_accumulation_steps x processes"
            remedy = f"Choose {product} = {then}, or set another output_dir"
        else:
            remedy = "Set another output_dir, or delete that one"
        raise UserError(f"cannot resume the run in {folder}: its {key} was {then}, this run's is {now}. {remedy}")


def describe_changed_arguments(start: Start, trainer: Trainer) -> str:
    """Return the training arguments that differ from those in the run card: " with key old -> new, ..."."""
    before = start.card.get("training_arguments", {})
    now = portable(json.loads(json.dumps(trainer.args.to_dict(), default=str)), Path(trainer.args.output_dir))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" with {', '.join(changed)}" if changed else ""
