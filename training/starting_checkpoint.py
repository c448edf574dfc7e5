"""Check the checkpoint that a TRL recipe starts from, before its data is read."""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.cli.checkpoints import (
    end_of_answer_token,
    load_tokenizer,
    require_causal_lm,
    require_quick_template,
)
from buddygpt.cli.errors import UserError
from buddygpt.cli.weights import require_all_weights
from buddygpt.training.adapters import prepare_lora
from buddygpt.training.hardware import require_hardware
from buddygpt.training.liger import register_liger
from buddygpt.training.limits import require_limits
from buddygpt.training.positions import extend_positions, parse_model_kwargs, require_positions
from buddygpt.training.zero3 import zero3_off


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
        require_quick_template(tokenizer)
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


def _read_template(path: Path) -> str:
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise UserError(f"chat_template_path: {path} is not a .jinja file; put the template of another model into one")
    return path.read_text(encoding="utf-8")
