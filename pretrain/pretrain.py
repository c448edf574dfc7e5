"""Pretrain a causal language model on token shards: a new model from a config, or an existing checkpoint.

    python data/prepare_pretrain.py --config data/configs/quickstart.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        pretrain/pretrain.py --config pretrain/configs/quickstart.yaml

Every option of transformers' `TrainingArguments` is also an option here, in the YAML or as `--key value`. The same
command resumes a stopped run.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import checkpoint_sha256, load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError, reading
from buddygpt.cli.files import file_sha256
from buddygpt.cli.weights import require_all_weights
from buddygpt.data.shards.blocks import BlockDataset, BlockStream, collate_blocks
from buddygpt.data.shards.format import MANIFEST
from buddygpt.data.shards.history import describe_mixture, make_order, update_history
from buddygpt.data.text.licenses import describe_data
from buddygpt.model.presets import load_config
from buddygpt.pretrain.annealing import count_decay_steps, start_with_optimizer_state
from buddygpt.pretrain.replay import replay_step
from buddygpt.pretrain.stream_trainer import PretrainTrainer
from buddygpt.training.hardware import require_hardware
from buddygpt.training.liger import register_liger
from buddygpt.training.limits import require_limits, require_memory
from buddygpt.training.model_card import describe_base
from buddygpt.training.optimizers import choose_optimizer
from buddygpt.training.positions import extend_positions, parse_model_kwargs, require_positions
from buddygpt.training.resume import Start, find_start
from buddygpt.training.run import building, recipe_defaults, run_recipe, run_training


@dataclass
class PretrainArguments:
    # data
    train_data: str = field(metadata={"help": "Folder of token shards (see data/README.md)."})
    tokenizer: str = field(metadata={"help": "Folder or Hub name of the tokenizer that made the shards."})
    eval_data: str | None = field(default=None, metadata={"help": "Folder of held-out token shards."})
    # model
    model_config: str | None = field(default=None, metadata={"help": "Preset name or config JSON of a new model."})
    vocab_size: int | None = field(
        default=None, metadata={"help": "Embedding rows of a new model. Default: the size of the tokenizer."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from, instead of a new model."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of the checkpoint's config to replace, such as {max_position_embeddings: 4096, "
            "rope_parameters: {rope_type: yarn}} to train longer rows."
        },
    )
    # rows
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row."})
    verify_data: bool = field(
        default=False, metadata={"help": "Hash every shard before training, instead of comparing sizes only."}
    )
    isolate_documents: bool = field(
        default=False, metadata={"help": "Keep attention inside documents; position ids restart at each document."}
    )
    # training
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flex_attention, flash_attention_2, ... Default: sdpa."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "choices": ["float32", "bfloat16"],
            "help": "Type of weights, gradients and optimizer states. bfloat16 halves them but loses small updates; "
            "`bf16: true` computes in bfloat16 and keeps float32 weights.",
        },
    )
    optimizer: str | None = field(
        default=None,
        metadata={"choices": ["muon"], "help": "muon: Muon for matrices, AdamW for the rest. Default: see `optim`."},
    )
    keep_optimizer: bool = field(
        default=False,
        metadata={"help": "Also take the optimizer state of model_name_or_path, a checkpoint-N folder."},
    )
    z_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the z-loss. Default: as in the model's config."}
    )
    # output
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to continue at each evaluation."})
    replay_step: int | None = field(
        default=None,
        metadata={"help": "Do not train; show the rows that this step of the run read, and the loss of each."},
    )


def main() -> None:
    args, training_args = parse_arguments(
        PretrainArguments, TrainingArguments, description=__doc__, defaults=recipe_defaults()
    )
    args.model_init_kwargs = parse_model_kwargs(args.model_init_kwargs)

    # Stop on impossible requests before anything is loaded.
    require_limits(args, training_args)
    require_hardware(training_args, args.attn_implementation)
    register_liger(training_args)
    choose_optimizer(args.optimizer, training_args)  # run_training uses it
    if args.dtype == "bfloat16" and training_args.fp16:
        raise UserError("dtype: bfloat16 and fp16: true contradict each other; remove one of them")
    set_seed(training_args.seed)

    # Data. Text of several sources is evaluated source by source.
    tokenizer = load_tokenizer(args.tokenizer)
    blocks = {"train": open_blocks(args.train_data, args, tokenizer)}
    eval_by_source: dict[str, BlockDataset] = {}
    if args.eval_data:
        blocks["eval"] = open_blocks(args.eval_data, args, tokenizer)
        eval_by_source = split_by_source(blocks["eval"])
    if args.verify_data and training_args.process_index == 0:
        for dataset in blocks.values():
            dataset.verify()

    # Model. A base model ends a text with the document separator and a chat model ends a turn with eos, so generation
    # stops at either.
    model = load_model(args, training_args, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {args.tokenizer} has no eos_token: add it to its tokenizer_config.json")
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, blocks["train"].eos_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    # Order of the blocks. A resumed run keeps the order it had, even if data was appended meanwhile.
    start = find_start(training_args, model)
    stream, data_history = open_stream(blocks["train"], training_args, start)
    count_decay_steps(training_args)

    # Trainer. Tokens per byte turn each loss into bits per byte. Flash attention needs the bounds of the documents.
    tokens_per_byte = {split: dataset.tokens_per_byte for split, dataset in blocks.items()}
    for source, dataset in eval_by_source.items():
        tokens_per_byte[f"eval_{source}"] = dataset.tokens_per_byte
    needs_bounds = args.isolate_documents and "flash" in model.config._attn_implementation
    with building("trainer"):
        trainer = PretrainTrainer(
            model=model,
            args=training_args,
            data_collator=partial(collate_blocks, with_bounds=needs_bounds),
            train_dataset=stream,
            eval_dataset=eval_by_source or blocks.get("eval"),
            processing_class=tokenizer,
            tokens_per_byte=tokens_per_byte,
        )
    if args.keep_optimizer:
        start_with_optimizer_state(trainer, args.model_name_or_path)
    if args.replay_step is not None:
        replay_step(trainer, args.replay_step)
        return

    # Train, evaluate, save. A run is resumed only if its origin is the same.
    origin = {
        "block_size": args.block_size,
        "isolate_documents": args.isolate_documents,
        "data_seed": stream.order.seed,
        "optimizer": args.optimizer,
        "eval_manifest_sha256": file_sha256(blocks["eval"].folder / MANIFEST) if args.eval_data else None,
        "base_sha256": checkpoint_sha256(args.model_name_or_path) if args.model_name_or_path else None,
        "model_init_kwargs": args.model_init_kwargs or None,
    }
    run_card = {"recipe": "pretrain", "arguments": vars(args), "origin": origin, "data_history": data_history}
    run_card |= {"data": describe_data(blocks["train"].folder), **describe_base(args.model_name_or_path)}
    # Only pretraining balances the experts; SFT and DPO keep the biases fixed, as DeepSeek-V3 does at the end.
    bias_update_speed = getattr(model.config, "bias_update_speed", 0)
    run_training(trainer, args.sample_prompts, run_card, bias_update_speed, trainer.describe_step, start)


def open_blocks(folder: str, args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> BlockDataset:
    """Return the blocks of a folder of shards; raise UserError if another tokenizer made them."""
    blocks = BlockDataset(folder, args.block_size, args.isolate_documents)
    blocks.check_tokenizer(tokenizer)
    return blocks


def split_by_source(blocks: BlockDataset) -> dict[str, BlockDataset]:
    """Return the blocks of each source with at least one block; nothing if there is only one such source."""
    sources = [source for source, tokens in blocks.sources.items() if tokens >= blocks.block_size]
    if len(sources) < 2:
        return {}
    return {
        source: BlockDataset(blocks.folder, blocks.block_size, blocks.isolate_documents, source) for source in sources
    }


def open_stream(
    blocks: BlockDataset, training_args: TrainingArguments, start: Start
) -> tuple[BlockStream, list[dict[str, Any]]]:
    """Return the blocks that the whole run reads, in order, and the history of its data for the run card.

    Sets `max_steps` if the run is measured in epochs.
    """
    global_batch = (
        training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    )
    with reading(Path(start.checkpoint or "").parent / "run.json"):
        history = update_history(start.card.get("data_history", []), blocks, start.step, global_batch)
    if training_args.process_index == 0:
        print(describe_mixture(history, blocks))

    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    order = make_order(history, blocks, seed)
    if training_args.max_steps < 0:
        training_args.max_steps = math.ceil(order.position(training_args.num_train_epochs) / global_batch)
    return BlockStream(blocks, order, training_args.max_steps * global_batch), history


def load_model(
    args: PretrainArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return the checkpoint `model_name_or_path`, or a new model of `model_config`, with the requested z-loss.

    Raises:
        UserError: Not exactly one of the two is given, it cannot be read, or it does not fit tokenizer or block size.
    """
    if (args.model_config is None) == (args.model_name_or_path is None):
        raise UserError("give one of model_config (a new model) and model_name_or_path (a checkpoint)")
    with building("model"):
        if args.model_name_or_path:
            model = load_checkpoint(args, tokenizer)
        else:
            model = make_model(args, training_args, tokenizer)
    require_positions("block_size", args.block_size, getattr(model.config, "max_position_embeddings", None))
    if args.z_loss_coef is not None:
        if not hasattr(model.config, "z_loss_coef"):
            raise UserError(f"z_loss_coef: a model of type {model.config.model_type} has no z-loss; remove the option")
        if not 0 <= args.z_loss_coef < math.inf:
            raise UserError(f"z_loss_coef is {args.z_loss_coef}; use 0 (off) or a small positive number, such as 1e-4")
        model.config.z_loss_coef = args.z_loss_coef
    return model


def load_checkpoint(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the checkpoint with `model_init_kwargs`; its embedding must have a row for every token."""
    if args.vocab_size is not None:
        raise UserError("vocab_size belongs to a new model (model_config); a checkpoint keeps its embedding")
    config = require_causal_lm(args.model_name_or_path)
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"the tokenizer {args.tokenizer} has {len(tokenizer)} entries, the checkpoint {args.model_name_or_path} "
            f"only {config.vocab_size}; use the checkpoint's own tokenizer"
        )
    require_all_weights(args.model_name_or_path)
    loading = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    changes = extend_positions(config, args.model_init_kwargs)
    return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **loading | changes)


def make_model(
    args: PretrainArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a new model with random weights and the special tokens of the tokenizer."""
    if args.model_init_kwargs:
        raise UserError("model_init_kwargs changes a checkpoint (model_name_or_path); edit the JSON of model_config")
    vocab_size = len(tokenizer) if args.vocab_size is None else args.vocab_size
    if vocab_size < len(tokenizer):
        raise UserError(f"vocab_size ({vocab_size}) is less than the {len(tokenizer)} entries of {args.tokenizer}")
    try:
        config = load_config(
            args.model_config,
            vocab_size=vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except Exception as error:  # the classes of configs raise many kinds for values that they cannot use
        raise UserError(f"cannot read the model config {args.model_config}: {error}") from error
    require_memory(config, training_args, bytes_per_weight=2 if args.dtype == "bfloat16" else 4)
    return AutoModelForCausalLM.from_config(config, dtype=args.dtype, attn_implementation=args.attn_implementation)


if __name__ == "__main__":
    run_recipe(main)
