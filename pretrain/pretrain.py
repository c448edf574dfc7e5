"""Pretrain a causal language model on token shards, from a config JSON or onward from a checkpoint.

    python data/prepare_pretrain.py --config data/configs/quickstart.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        pretrain/pretrain.py --config pretrain/configs/quickstart.yaml

Every option of transformers' `TrainingArguments` is one here, in the YAML or as `--key value`. Runs resume by
themselves.
"""

import inspect
import math
from dataclasses import dataclass, field
from functools import partial

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import checkpoint_sha256, load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256
from buddygpt.data.shards.blocks import BlockDataset, BlockStream, collate_blocks
from buddygpt.data.shards.format import MANIFEST
from buddygpt.data.shards.history import make_order, update_history
from buddygpt.data.shards.trace import describe_blocks
from buddygpt.model.presets import load_config
from buddygpt.pretrain.replay import replay_step
from buddygpt.pretrain.stream_trainer import StreamTrainer
from buddygpt.training.hardware import require_hardware
from buddygpt.training.liger import register_liger
from buddygpt.training.optimizers import choose_optimizer
from buddygpt.training.resume import Start, find_start
from buddygpt.training.run import run_recipe, run_training


@dataclass
class PretrainArguments:
    train_data: str = field(metadata={"help": "Folder of token shards (see data/README.md)."})
    tokenizer: str = field(metadata={"help": "Folder or Hub name of the tokenizer that made the shards."})
    eval_data: str | None = field(default=None, metadata={"help": "Folder of held-out token shards."})
    model_config: str | None = field(default=None, metadata={"help": "Preset name or config JSON of a new model."})
    vocab_size: int | None = field(
        default=None, metadata={"help": "Rows of a new model's embedding. Default: the tokenizer's size."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to continue from instead."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row."})
    verify_data: bool = field(default=False, metadata={"help": "Hash every shard before training, not only sizes."})
    isolate_documents: bool = field(
        default=False, metadata={"help": "Keep attention inside documents (position ids restart at each)."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flex_attention, flash_attention_2, ... Default: sdpa."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "choices": ["float32", "bfloat16"],
            "help": "Of the weights, gradients and optimizer states. bfloat16 halves them and loses small updates; "
            "`bf16: true` computes in it and keeps float32 weights.",
        },
    )
    optimizer: str | None = field(
        default=None,
        metadata={"choices": ["muon"], "help": "muon, with AdamW for what is no matrix. Default: `optim`."},
    )
    z_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the z-loss. Default: what the model's config has."}
    )
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to continue at each evaluation."})
    replay_step: int | None = field(
        default=None,
        metadata={"help": "Only show what this step of the run read, and the loss of each row."},
    )


class PretrainTrainer(StreamTrainer):
    """`StreamTrainer` that shows bits per byte beside every loss: nats per token x tokens per byte of text / ln 2.

    Beside the loss of training stands also what was read of each source: epochs, and its share of all blocks.
    Held-out text of several sources, given as a dictionary, is also evaluated as a whole.
    """

    def __init__(self, *args, tokens_per_byte: dict[str, float], **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_per_byte = tokens_per_byte

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for split, ratio in self.tokens_per_byte.items():
            prefix = "" if split == "train" else f"{split}_"
            if f"{prefix}loss" in logs:
                logs[f"{prefix}bits_per_byte"] = logs[f"{prefix}loss"] * ratio / math.log(2)
        if "loss" in logs:
            for source, (epochs, share) in self.train_dataset.order.progress_by_source(self.blocks_read).items():
                logs |= {f"epochs/{source}": epochs, f"share/{source}": share}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and "skip_logits" in inspect.signature(self.model.forward).parameters:
            inputs = {**inputs, "skip_logits": True}  # as `Trainer` does for Liger's models
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return metrics
        blocks = {source: len(part) for source, part in self.eval_dataset.items()}
        losses = (metrics[f"eval_{source}_loss"] * count for source, count in blocks.items())
        whole = {"eval_loss": sum(losses) / sum(blocks.values())}
        self.log(whole)
        return metrics | whole

    def describe_step(self, step: int) -> str:
        """Where the blocks that a step reads come from: shards, documents, input files."""
        stream, global_batch = self.train_dataset, self.get_total_train_batch_size(self.args)
        return describe_blocks(stream.blocks, stream.order.which_blocks(step, global_batch))


def load_model(args: PretrainArguments, tokenizer):
    """The checkpoint or a new model, with the z-loss that was asked for."""
    model = make_model(args, tokenizer)
    if args.z_loss_coef is not None:
        if not hasattr(model.config, "z_loss_coef"):
            raise UserError(f"z_loss_coef: a model of type {model.config.model_type} has no z-loss; leave it out")
        if not 0 <= args.z_loss_coef < math.inf:
            raise UserError(f"z_loss_coef is {args.z_loss_coef}; use 0 (off) or a small number above, such as 1e-4")
        model.config.z_loss_coef = args.z_loss_coef
    return model


def make_model(args: PretrainArguments, tokenizer):
    """A new model from `model_config`, its vocabulary and special tokens the tokenizer's; or the checkpoint."""
    if (args.model_config is None) == (args.model_name_or_path is None):
        raise UserError("give one of model_config (a new model) and model_name_or_path (a checkpoint)")
    if args.model_name_or_path:
        if args.vocab_size is not None:
            raise UserError("vocab_size belongs to a new model (model_config); a checkpoint keeps its embedding")
        config = require_causal_lm(args.model_name_or_path)
        if config.vocab_size < len(tokenizer):
            raise UserError(
                f"the tokenizer {args.tokenizer} has {len(tokenizer)} entries, the checkpoint "
                f"{args.model_name_or_path} only {config.vocab_size}: use the checkpoint's own tokenizer"
            )
        return AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, attn_implementation=args.attn_implementation
        )
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
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot read the model config {args.model_config}: {error}") from error
    return AutoModelForCausalLM.from_config(config, dtype=args.dtype, attn_implementation=args.attn_implementation)


def load_blocks(args: PretrainArguments, tokenizer) -> dict[str, BlockDataset]:
    """Training blocks and, where there are any, held-out blocks; refused where another tokenizer made them."""
    folders = {"train": args.train_data} | ({"eval": args.eval_data} if args.eval_data else {})
    blocks = {
        split: BlockDataset(folder, args.block_size, isolate_documents=args.isolate_documents)
        for split, folder in folders.items()
    }
    for dataset in blocks.values():
        dataset.check_tokenizer(tokenizer)
    return blocks


def split_by_source(blocks: BlockDataset) -> dict[str, BlockDataset]:
    """The blocks of each source that fills one at least; empty where there is only one source."""
    size, isolate = blocks.block_size, blocks.isolate_documents
    filling = [source for source, tokens in blocks.sources.items() if tokens >= size]
    return {source: BlockDataset(blocks.folder, size, isolate, source) for source in filling if len(filling) > 1}


def describe_mixture(history: list[dict], blocks: BlockDataset) -> str:
    """What is read in an epoch of the mixture, and when that has changed, in a line."""
    sources, epochs = history[-1]["sources"], blocks.epochs
    total = sum(share["slots"] for share in sources.values())
    shares = [f"{name} {share['slots'] / total:.1%} ({epochs[name]:.4g} epochs)" for name, share in sources.items()]
    changes = [f"from epoch {entry['epoch']} on, found at step {entry['step']}" for entry in history[1:]]
    return f"Data: {total:,} blocks an epoch, {', '.join(shares)}" + (f"; {changes[-1]}" if changes else "")


def open_stream(blocks: BlockDataset, training_args: TrainingArguments, start: Start) -> tuple[BlockStream, list]:
    """What the run reads from its first step to its last, and the history of its data for the run card."""
    args = training_args
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    history = update_history(start.card.get("data_history", []), blocks, start.step, global_batch)
    order = make_order(history, blocks, args.seed if args.data_seed is None else args.data_seed)
    if args.process_index == 0:
        print(describe_mixture(history, blocks))
    if args.max_steps < 0:
        args.max_steps = math.ceil(order.position(args.num_train_epochs) / global_batch)
    return BlockStream(blocks, order, args.max_steps * global_batch), history


def main() -> None:
    args, training_args = parse_arguments(PretrainArguments, TrainingArguments, description=__doc__)
    require_hardware(training_args, args.attn_implementation)
    register_liger(training_args)
    optimizer = choose_optimizer(args.optimizer, training_args)
    if args.dtype == "bfloat16" and training_args.fp16:
        raise UserError("dtype: bfloat16 and fp16: true contradict each other: drop one of them")
    set_seed(training_args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    blocks = load_blocks(args, tokenizer)
    for dataset in blocks.values() if args.verify_data and training_args.process_index == 0 else ():
        dataset.verify()
    model = load_model(args, tokenizer)
    # A base model ends a text with the document separator, a chat model a turn with eos: generation stops at either.
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, blocks["train"].eos_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    held_out = split_by_source(blocks["eval"]) if args.eval_data else {}
    text = blocks | {f"eval_{source}": part for source, part in held_out.items()}
    start = find_start(training_args, model.config)
    stream, data_history = open_stream(blocks["train"], training_args, start)
    flash = args.isolate_documents and "flash" in model.config._attn_implementation
    trainer = PretrainTrainer(
        model=model,
        args=training_args,
        data_collator=partial(collate_blocks, with_bounds=flash),
        train_dataset=stream,
        eval_dataset=held_out or blocks.get("eval"),
        processing_class=tokenizer,
        tokens_per_byte={name: dataset.tokens_per_byte for name, dataset in text.items()},
        optimizer_cls_and_kwargs=optimizer,
    )
    if args.replay_step is not None:
        return replay_step(trainer, args.replay_step)
    origin = {"block_size": args.block_size, "isolate_documents": args.isolate_documents}
    origin |= {"data_seed": stream.order.seed, "optimizer": args.optimizer}
    origin["eval_manifest_sha256"] = file_sha256(blocks["eval"].folder / MANIFEST) if args.eval_data else None
    origin["base_sha256"] = checkpoint_sha256(args.model_name_or_path) if args.model_name_or_path else None
    run_card = {"recipe": "pretrain", "arguments": vars(args), "origin": origin, "data_history": data_history}
    # SFT and DPO leave the balance as it is, like DeepSeek-V3 the end of its pretraining.
    speed = getattr(model.config, "bias_update_speed", 0)
    run_training(trainer, args.sample_prompts, run_card, speed, trainer.describe_step, start)


if __name__ == "__main__":
    run_recipe(main)
